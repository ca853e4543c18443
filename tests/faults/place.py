"""What a fault is, where its place lies in a tree, and the tree with the fault in it.

A place is named by what outlives a move: the qualified name of the function around it and the
lines themselves, stripped; the lines before and after them decide between several such places.
"""

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAULTS = Path(__file__).with_name("faults.json")


class PlaceError(Exception):
    """The place of a fault is not there, or not the only one."""


@dataclass(frozen=True)
class Fault:
    """One change of the source. `function` is "" at module level; `file` and `line` are of the day
    it was drawn, or last put into code that was rewritten, and help only where several places are
    alike. `gone` says of code that nerve has no more what does its work."""

    id: int
    kind: str
    function: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    line_before: str
    line_after: str
    file: str
    line: int
    gone: str = ""

    def __str__(self) -> str:
        return f"{' '.join(self.before)}  ->  {' '.join(self.after)}"


@dataclass(frozen=True)
class Place:
    path: Path
    first: int
    """Index of the first line, from 0."""


def load(path: Path = FAULTS) -> list[Fault]:
    return [
        Fault(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})
        for entry in json.loads(path.read_text())["faults"]
    ]


def scopes(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Qualified names (`Class.method.inner`) of the functions and classes, and their nodes."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                yield name, child
            yield from below(child, name)

    return below(tree, "")


def neighbors(lines: list[str], first: int, n: int) -> tuple[str, str]:
    """The nearest lines before and after that are not blank, stripped; "" at the file's ends."""
    before = next((line.strip() for line in reversed(lines[:first]) if line.strip()), "")
    after = next((line.strip() for line in lines[first + n :] if line.strip()), "")
    return before, after


def find(fault: Fault, tree: Path) -> Place:
    """The place of `fault` anywhere below `tree`/nerve.

    The function of its qualified name is looked for first, then one of the same last name, then
    the lines with both neighbors anywhere.

    Raises:
        PlaceError: where no place or more than one is left, or the code is gone.
    """
    if fault.gone:
        raise PlaceError(f"code is gone: {fault.gone}")
    exact, same_name, elsewhere = [], [], []
    for path in sorted((tree / "nerve").rglob("*.py")):
        source = path.read_text()
        lines = source.splitlines()
        n = len(fault.before)
        hits = [
            i
            for i in range(len(lines) - n + 1)
            if tuple(line.strip() for line in lines[i : i + n]) == fault.before
        ]
        if not hits:
            continue
        named = [("", 0, len(lines))] if not fault.function else []
        for name, node in scopes(ast.parse(source)):
            named.append((name, node.lineno - 1, node.end_lineno))
        for i in hits:
            around = {name for name, first, end in named if first <= i < end}
            match = neighbors(lines, i, n)
            score = sum(
                a == b for a, b in zip(match, (fault.line_before, fault.line_after), strict=True)
            )
            place = Place(path, i)
            last = fault.function.rpartition(".")[2]
            if fault.function in around:
                exact.append((score, path.name == Path(fault.file).name, place))
            elif last in {name.rpartition(".")[2] for name in around}:
                same_name.append((score, path.name == Path(fault.file).name, place))
            elif score == 2:
                elsewhere.append((score, path.name == Path(fault.file).name, place))
    for found in (exact, same_name, elsewhere):
        if found:
            best = max(key for *key, _ in found)
            places = [place for *key, place in found if key == best]
            if len(places) > 1:
                raise PlaceError(f"place not unique: {len(places)} places alike")
            return places[0]
    raise PlaceError("place not found")


def put_in(fault: Fault, tree: Path) -> Path:
    """Writes `fault` into `tree` and returns the file. Raises: PlaceError, as `find`."""
    place = find(fault, tree)
    lines = place.path.read_text().splitlines()
    n = len(fault.before)
    indents = [line[: len(line) - len(line.lstrip())] for line in lines[place.first :][:n]]
    if len(fault.after) != n:
        indents = indents[:1] * len(fault.after)
    new = [indent + line for indent, line in zip(indents, fault.after, strict=True)]
    source = "\n".join([*lines[: place.first], *new, *lines[place.first + n :]]) + "\n"
    ast.parse(source)
    place.path.write_text(source)
    return place.path
