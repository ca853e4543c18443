"""How the commands print."""

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.control import strip_control_codes

WIDTH = 120
"""Columns where the output is no terminal."""


def console() -> Console:
    """Where tables go: stdout as it is now. Brackets are text, as in an override with a list."""
    _print_all_letters()
    return Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=False, markup=False)


def say(line: str) -> None:
    """Prints a line as it is, at once: processes that write to the same terminal come after it."""
    _print_all_letters()
    print(line, flush=True)


def say_table(names: Sequence[str], right: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table as rich's are, with cells folded where they have no room, in a small part
    of the time: of ten thousand rows rich's takes nine seconds.

    Args:
        names: of the columns.
        right: those whose cells end at the right.
        rows: a text for each column.
    """
    cells = [[_lines_of(text) for text in row] for row in (names, *rows)]
    widths = [max(cell_len(line) for row in cells for line in row[i]) for i in range(len(names))]
    widths = _narrowed(widths, console().width - 3 * len(names) - 1)
    is_right = [name in right for name in names]
    head = (f"┃ {' ┃ '.join(line)} ┃" for line in _folded(cells[0], widths, is_right))
    body = (
        f"│ {' │ '.join(line)} │" for row in cells[1:] for line in _folded(row, widths, is_right)
    )
    lines = [_rule(widths, "┏━┳┓"), *head, _rule(widths, "┡━╇┩"), *body, _rule(widths, "└─┴┘")]
    say("\n".join(lines))


def _lines_of(text: str) -> list[str]:
    return strip_control_codes(text).split("\n")


def _narrowed(widths: list[int], room: int) -> list[int]:
    """Widths for which there is room, the widest ones cut; none below 1."""
    while sum(widths) > room and max(widths) > 1:
        widest = widths.index(max(widths))
        widths = [width - (i == widest) for i, width in enumerate(widths)]
    return widths


def _folded(row: list[list[str]], widths: list[int], right: list[bool]) -> Iterator[list[str]]:
    """The lines of a row, each with a piece of every cell."""
    pieces = [
        [piece for line in lines for piece in _pieces(line, width)]
        for lines, width in zip(row, widths, strict=True)
    ]
    for i in range(max(map(len, pieces))):
        line = []
        for own, width, is_right in zip(pieces, widths, right, strict=True):
            piece = own[i] if i < len(own) else ""
            room = " " * (width - cell_len(piece))
            line.append(room + piece if is_right else piece + room)
        yield line


def _pieces(line: str, width: int) -> list[str]:
    return [line] if cell_len(line) <= width else chop_cells(line, width)


def _rule(widths: Sequence[int], marks: str) -> str:
    start, bar, between, end = marks
    return start + between.join(bar * (width + 2) for width in widths) + end


def _print_all_letters() -> None:
    """Lets stdout write what its encoding lacks by its number, as stderr does: the name of a file
    can hold bytes that are no text at all."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def figure(value: float | None) -> str:
    """A number in three significant places or three decimals; – where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def counts(described: Mapping[str, int | float | str]) -> str:
    """What data come to: `n_…` as counts, others by their names."""
    return ", ".join(
        f"{_plain(value)} {name[2:].replace('_', ' ')}"
        if name.startswith("n_")
        else f"{name.replace('_', ' ')} {_plain(value)}"
        for name, value in described.items()
    )


def _plain(value: int | float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.3g}" if isinstance(value, float) else f"{value:,}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 42 s, 7 min 5 s, 3 h 20 min, 2 d 4 h."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for name, size in units:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"
