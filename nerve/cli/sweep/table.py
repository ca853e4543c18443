"""What a sweep says of its cells: before, while they run, and at the end."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.table import Table

from nerve.cli.console import console, figure, say
from nerve.cli.sweep.grid import Cell
from nerve.errors import NerveError, StoreError
from nerve.storage.record import RunRecord
from nerve.storage.state import RunState

FOUND = {
    RunState.NEW: "new",
    RunState.INTERRUPTED: "interrupted",
    RunState.DEAD: "killed",
    RunState.FAILED: "failed",
    RunState.DONE: "done",
    RunState.ALIVE: "at work elsewhere",
}
DEED = {
    RunState.NEW: "run",
    RunState.INTERRUPTED: "resumed",
    RunState.DEAD: "resumed",
    RunState.FAILED: "retried",
}
SHOWN = 8
"""Cells or jobs that are named in one line; more are counted."""


class SweepError(NerveError):
    """A sweep ended with cells that are not done; the message says which and why.

    Attributes:
        exit_status: of the command.
    """

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Report:
    """Tells a sweep's user about its cells. What became of each is read from its directory.

    Args:
        folder: of the sweep.
        cells: all of the grid.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self._folder = folder
        self._cells = cells
        self._labels = _labels(cells)
        self._starts = [_n_starts(cell) for cell in cells]
        self._n_to_do = sum(cell.is_to_do for cell in cells)
        self._n_started = 0
        self._ended: list[Cell] = []

    def begin(self) -> None:
        """Says how many cells there are, and what was found of them."""
        kinds = Counter(
            "refused"
            if cell.refusal is not None
            else "doubled"
            if cell.twin is not None
            else "sent before"
            if cell.job is not None
            else FOUND[cell.found]
            for cell in self._cells
        )
        found = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        say(f"sweep {self._folder}: {n_trials(len(self._cells))}, {found}; {self._n_to_do} to run")
        jobs = [cell.job for cell in self._cells if cell.job is not None]
        if jobs:
            say(f"waiting also for {_some(jobs)}, with the values of hydra.launcher of their time")

    def starting(self, cell: Cell) -> None:
        """Says that a cell starts."""
        self._n_started += 1
        say(
            f"[{self._n_started}/{self._n_to_do}] {self._labels[cell.number]} "
            f"({DEED[cell.found]} in {cell.directory})"
        )

    def ended(self, cell: Cell) -> None:
        """Says how a cell ended, whose directory has just been looked at."""
        self._ended.append(cell)
        state, record, reason = _ending(cell)
        loss = f", validation loss {figure(record.final.get('val_loss'))}" if record else ""
        said = f"done{loss}" if state == RunState.DONE else reason
        say(f"{self._labels[cell.number]}: {said}")

    def end(self, signum: int | None = None, errors: Sequence[Exception] = ()) -> None:
        """Prints the summary.

        Args:
            signum: the signal that asked the sweep to stop, if any.
            errors: what a launcher raised.

        Raises:
            SweepError: unless all cells are done.
        """
        table = Table(title=f"sweep {self._folder}", title_justify="left")
        for name in ("", "cell", "this time", "state", "step", "val loss", "directory"):
            right = name in ("", "step", "val loss")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        reasons: dict[str, list[Cell]] = {}
        settled = {cell.directory for cell in self._ended}
        for run in {cell.directory: cell.run for cell in self._cells}.values():
            if run.path not in settled:
                run.reload()
        for cell in self._cells:
            state, record, reason = _ending(cell)
            known = record is not None and cell.twin is None and cell.refusal is None
            table.add_row(
                str(cell.number),
                self._labels[cell.number],
                self._deed(cell),
                state,
                record.progress if record and known else "",
                figure(record.final.get("val_loss")) if record and known else "",
                cell.directory.name if cell.refusal is None else "",
            )
            if cell.twin is None and state != RunState.DONE:
                reasons.setdefault(reason, []).append(cell)
        console().print(table)
        if reasons or signum is not None:
            self._raise(reasons, signum, errors)

    def _deed(self, cell: Cell) -> str:
        if cell.refusal is not None:
            return "refused"
        if cell.twin is not None:
            return f"same as {cell.twin}"
        if cell.job is not None:
            return "waited for"
        if not cell.is_to_do:
            return "skipped"
        started = _n_starts(cell) > self._starts[cell.number]
        return DEED[cell.found] if started else "not started"

    def _raise(
        self, reasons: dict[str, list[Cell]], signum: int | None, errors: Sequence[Exception]
    ) -> NoReturn:
        n_missing = sum(map(len, reasons.values()))
        lines = [f"{n_missing} of {n_trials(len(self._cells))} in {self._folder} are not done."]
        for reason, cells in reasons.items():
            names = [f"{cell.number} ({self._labels[cell.number]})" for cell in cells]
            lines.append(f"  {_some(names)}: {reason}")
        for error in errors:
            # submitit's message goes on with the whole log of the job; its first line has the path.
            lines.append(f"  the launcher: {(str(error) or repr(error)).splitlines()[0]}")
        lines.append(
            "The same command goes on with what is not done; retry=true includes what failed."
        )
        raise SweepError("\n".join(lines), 1 if signum is None else 128 + signum)


def _ending(cell: Cell) -> tuple[str, RunRecord | None, str]:
    """A cell's state, its record, and why it is not done."""
    if cell.refusal is not None:
        return "", None, cell.refusal
    try:
        state, record = cell.run.state, cell.run.record
    except StoreError as error:
        return "unreadable", None, str(error)
    if record is None:
        reason = "not started" if state == RunState.NEW else FOUND[state]
        return state, None, cell.trouble or reason
    why = ": ".join((record.error or {}).values())
    return state, record, f"{FOUND[state]}: {why}" if why else FOUND[state]


def _n_starts(cell: Cell) -> int:
    """How often a process has begun to work in the cell's directory."""
    if cell.refusal is not None:
        return 0
    try:
        return cell.run.n_starts
    except StoreError:
        return 0


def _labels(cells: Sequence[Cell]) -> list[str]:
    """What sets each cell apart: its overrides that not all of them have."""
    counts = Counter(override for cell in cells for override in set(cell.overrides))
    return [
        " ".join(override for override in cell.overrides if counts[override] < len(cells))
        or "the only one"
        for cell in cells
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def n_trials(n: int) -> str:
    """`1 trial`, `2 trials`."""
    return "1 trial" if n == 1 else f"{n} trials"
