"""How the commands read lists, print, and fail."""

import argparse
import io
import math
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from rich.console import Console

WIDTH = 120
"""Number of columns if the output is not a terminal."""


def console() -> Console:
    """A console for tables, on the current stdout. Brackets are plain text, as in an override with
    a list."""
    print_all_letters()
    return Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=False, markup=False)


def say(line: str) -> None:
    """Prints a line unchanged and flushes it, since other processes may write to the same terminal
    next."""
    print_all_letters()
    print(line, flush=True)


def say_next(directory: Path) -> None:
    """Prints how to show and to load the results in a run directory, or in a folder of runs."""
    say(f"report: nerve-report {shlex.quote(str(directory))}")
    say(
        f"in a notebook: import nerve; metrics = nerve.load_metrics({os.path.abspath(directory)!r})"
    )


def fail(command: str, message: str, exit_status: int = 1) -> NoReturn:
    """Ends a command with a message on stderr that starts with the command's name."""
    print(f"{command}: {message}", file=sys.stderr)
    sys.exit(exit_status)


def whole_numbers(text: str) -> tuple[int, ...]:
    """The numbers of an argument such as 0,100,400."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas, such as 0,100,400; got {text!r}"
        ) from error


def print_all_letters() -> None:
    """Makes stdout escape characters that its encoding lacks, as stderr does: a file name may
    contain bytes that are not valid text, and the locale C has only ASCII.

    `console` and `say` call it; a command that logs to stdout must call it first.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    raises = {"strict"} if sys.stdout.encoding.lower() == "utf-8" else {"strict", "surrogateescape"}
    if sys.stdout.errors in raises:
        sys.stdout.reconfigure(errors="backslashreplace")


def figure(value: float | None) -> str:
    """A number with three decimals, or one from 10 on; – for None or NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def error_text(error: Mapping[str, str] | None) -> str:
    """The error with which a run ended, from its record; an interruption has no type."""
    named = dict(error or {})
    if named.get("type") == "Interrupted":
        del named["type"]
    return ": ".join(filter(None, named.values()))


def duration(seconds: float) -> str:
    """A time in its two largest units: 42 s, 7 min 5 s, 3 h 20 min, 2 d 4 h."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for name, size in units:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"
