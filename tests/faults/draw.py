"""Draws forty faults from all folders of nerve/ and writes faults.json.

    python tests/faults/draw.py

Drawn once, on the code of the commit that faults.json names. Every folder gives faults in
proportion to its lines and at least two; within a folder the files come in random order, one fault
each before any gives a second; the kinds take turns:

- operator: + and -, * and /, and and or, & and | exchanged, `not` dropped
- comparison: < and <=, > and >=, == and !=, is and is not, in and not in exchanged
- constant: a whole number plus one, a fraction doubled, a boolean flipped
- call: a call that is a statement becomes `pass`; `f(x)` becomes `x`

Docstrings, annotations, decorators, the text of messages (raise, f-strings, what is logged or
printed) and warnings' stack levels are no places.
"""

import ast
import json
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from place import FAULTS, Fault, PlaceError, find, neighbors

ROOT = Path(__file__).parents[2]
SEED, N_FAULTS, AT_LEAST = 14, 40, 2
KINDS = ("operator", "comparison", "constant", "call")

BINARY = {ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")}
BINARY |= {ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
COMPARISONS: dict[type, tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
MESSAGES = re.compile(r"^(log\.\w+|print|warnings\.warn|_warn|rank_zero_\w+|console\(\)\.print)$")
Span = tuple[int, int, int, int]


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


class Candidates(ast.NodeVisitor):
    """Collects (kind, function, span, new text) of one file."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.splitlines()
        self.function: list[str] = []
        self.found: list[tuple[str, str, Span, str]] = []
        self.visit(ast.parse(source))

    def add(self, kind: str, span: Span, text: str) -> None:
        self.found.append((kind, ".".join(self.function), span, text))

    def between(self, left: ast.expr, right: ast.expr, change: tuple[str, str], kind: str) -> None:
        """Exchanges the operator that stands between two operands on one line."""
        for row in range(left.end_lineno or 0, right.lineno + 1):
            line = self.lines[row - 1]
            start = characters(line, left.end_col_offset or 0) if row == left.end_lineno else 0
            end = characters(line, right.col_offset) if row == right.lineno else len(line)
            pattern = re.escape(change[0]).replace(r"\ ", " ")
            if match := re.search(rf"(?<![\w]){pattern}(?![\w])", line[start:end]):
                first = start + match.start()
                self.add(kind, (row, first, row, first + len(change[0])), change[1])
                return

    def skip(self, node: ast.AST) -> None:
        """No faults below such a node."""

    visit_JoinedStr = visit_Raise = visit_Assert = visit_Import = visit_ImportFrom = skip

    def visit_scope(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.function.append(node.name)
        if isinstance(node, ast.FunctionDef):
            for default in [*node.args.defaults, *node.args.kw_defaults]:
                if default is not None:
                    self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.function.pop()

    visit_FunctionDef = visit_ClassDef = visit_scope

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if "__all__" not in names:
            self.visit(node.value)

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg != "stacklevel":
            self.visit(node.value)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        text = is_text(node.left) or is_text(node.right)
        none = isinstance(node.right, ast.Constant) and node.right.value is None
        if type(node.op) in BINARY and not text and not none:
            self.between(node.left, node.right, BINARY[type(node.op)], "operator")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        change = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self.between(left, right, change, "operator")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not) and node.lineno == node.operand.lineno:
            self.add("operator", span(node, self.lines, end=node.operand), "")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
            self.between(left, right, COMPARISONS[type(op)], "comparison")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add("constant", span(node, self.lines), str(not value))
        elif isinstance(value, int):
            self.add("constant", span(node, self.lines), str(value + 1))
        elif isinstance(value, float):
            self.add("constant", span(node, self.lines), repr(2 * value or 1.0))

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not is_message(node.value):
            self.add("call", span(node, self.lines), "pass")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if is_message(node):
            return
        argument = node.args[0] if len(node.args) == 1 and not node.keywords else None
        if (
            argument is not None
            and node.lineno == node.end_lineno
            and not isinstance(argument, ast.Starred)
        ):
            text = ast.get_source_segment(self.source, argument) or ""
            simple = isinstance(argument, ast.Name | ast.Attribute | ast.Call | ast.Subscript)
            simple |= isinstance(argument, ast.GeneratorExp) or is_text(argument)
            self.add("call", span(node, self.lines), text if simple else f"({text})")
        self.generic_visit(node)


def is_message(call: ast.Call) -> bool:
    return bool(MESSAGES.match(ast.unparse(call.func)))


def characters(line: str, n_bytes: int) -> int:
    return len(line.encode()[:n_bytes].decode())


def span(node: ast.AST, lines: list[str], end: ast.AST | None = None) -> Span:
    """Row and column (characters) of the start of `node` and of its end, or the start of `end`."""
    first, last = node.lineno, (end.lineno if end else node.end_lineno)
    column = end.col_offset if end else node.end_col_offset
    start = characters(lines[first - 1], node.col_offset)
    return first, start, last, characters(lines[last - 1], column)


def faults_of(path: Path, root: Path) -> Iterator[Fault]:
    """All candidates of a file whose code is another."""
    source = path.read_text()
    lines = source.splitlines()
    for kind, function, (first, start, last, end), text in Candidates(source).found:
        changed = lines[first - 1][:start] + text + lines[last - 1][end:]
        after = [*lines[: first - 1], changed, *lines[last:]]
        try:
            if ast.dump(ast.parse("\n".join(after))) == ast.dump(ast.parse(source)):
                continue
        except SyntaxError:
            continue
        around = neighbors(lines, first - 1, last - first + 1)
        fault = Fault(
            id=0,
            kind=kind,
            function=function,
            before=tuple(line.strip() for line in lines[first - 1 : last]),
            after=(changed.strip(),),
            line_before=around[0],
            line_after=around[1],
            file=str(path.relative_to(root)),
            line=first,
        )
        yield fault


def shares(sizes: dict[str, int], n: int) -> dict[str, int]:
    """`n` divided in proportion to `sizes`, at least AT_LEAST each (largest remainder)."""
    free = n - AT_LEAST * len(sizes)
    exact = {name: free * size / sum(sizes.values()) for name, size in sizes.items()}
    given = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: given[name] - exact[name])
    for name in by_remainder[: free - sum(given.values())]:
        given[name] += 1
    return {name: AT_LEAST + given[name] for name in sizes}


def draw(root: Path, n: int, seed: int) -> list[Fault]:
    """`n` faults of the package below `root`."""
    rng = random.Random(seed)
    folders: dict[str, list[Path]] = {}
    for path in sorted((root / "nerve").rglob("*.py")):
        folders.setdefault(str(path.parent.relative_to(root)), []).append(path)
    sizes = {
        name: sum(len(path.read_text().splitlines()) for path in paths)
        for name, paths in folders.items()
    }
    drawn: list[Fault] = []
    for folder, share in shares(sizes, n).items():
        wanted = len(drawn) + share
        places = {path: list(faults_of(path, root)) for path in folders[folder]}
        paths = [path for path in folders[folder] if places[path]]
        rng.shuffle(paths)
        while len(drawn) < wanted:
            path = paths.pop(0)
            paths.append(path)
            turn = [KINDS[(len(drawn) + k) % len(KINDS)] for k in range(len(KINDS))]
            for fault in (rng.choice(c) for k in turn if (c := of_kind(places[path], k))):
                if is_found(fault, root) and not any(same_place(fault, other) for other in drawn):
                    drawn.append(Fault(**{**asdict(fault), "id": len(drawn) + 1}))
                    break
    return drawn


def of_kind(faults: list[Fault], kind: str) -> list[Fault]:
    return [fault for fault in faults if fault.kind == kind]


def same_place(one: Fault, other: Fault) -> bool:
    return (one.file, one.line) == (other.file, other.line)


def is_found(fault: Fault, root: Path) -> bool:
    """Whether its place is found again, and is the only one."""
    try:
        place = find(fault, root)
    except PlaceError:
        return False
    return (place.path, place.first) == (root / fault.file, fault.line - 1)


def main() -> None:
    git = ("git", "-C", str(ROOT), "log", "-1", "--format=%H", "--", "nerve")
    commit = subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    faults = [asdict(fault) for fault in draw(ROOT, N_FAULTS, SEED)]
    content = {"seed": SEED, "commit_of_nerve": commit, "faults": faults}
    FAULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
