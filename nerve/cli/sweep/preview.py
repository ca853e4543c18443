"""`check=true`: what a command would run, and what of it is refused."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from nerve.cli.console import console, say
from nerve.cli.sweep.grid import Cell
from nerve.cli.sweep.table import FOUND, SweepError, n_trials

UNITS = ("B", "kB", "MB", "GB", "TB")


def preview(folder: Path, cells: Sequence[Cell]) -> None:
    """Prints the trials of a sweep, each with its state and what it would take; starts nothing.

    Args:
        folder: of the sweep.
        cells: all of the grid, planned where they are to be run.

    Raises:
        SweepError: where some are refused, with the reasons.
    """
    from nerve.cli.experiment.estimate import COUNTED, Estimate  # torch takes seconds to import

    table = Table(title=f"what would run in {folder}", title_justify="left")
    for name in ("", "trial", "state", "parameters", "memory"):
        right = name in ("", "parameters", "memory")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    estimates = [Estimate.of(cell.plan) if cell.plan else Estimate(None, None) for cell in cells]
    for cell, estimate in zip(cells, estimates, strict=True):
        n, memory = estimate.n_parameters, estimate.memory_bytes
        table.add_row(
            str(cell.number),
            " ".join(each for each in cell.overrides if not each.startswith("check=")),
            _state(cell),
            "–" if n is None else f"{n:,}",
            "–" if memory is None else _size(memory),
        )
    console().print(table)
    kinds = Counter("doubled" if cell.twin is not None else _state(cell) for cell in cells)
    n_to_do = sum(cell.is_to_do for cell in cells)
    found = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    say(f"{n_trials(len(cells))}: {found}; {n_to_do} to run. Nothing was started.")
    memories = {estimate.memory_bytes for estimate in estimates}
    if memories - {None}:
        say(COUNTED)
    if None in memories:
        say("A dash: of a trial that is not to run, of what only the data tell, or not known.")
    refused = [cell for cell in cells if cell.refusal is not None]
    if refused:
        lines = [f"{len(refused)} of {n_trials(len(cells))} in {folder} are refused."]
        lines += [f"  {cell.number}: {cell.refusal}" for cell in refused]
        raise SweepError("\n".join(lines), exit_status=1)


def _state(cell: Cell) -> str:
    if cell.refusal is not None:
        return "refused"
    if cell.twin is not None:
        return f"same as {cell.twin}"
    return "sent before" if cell.job is not None else FOUND[cell.found]


def _size(n_bytes: float) -> str:
    for unit in UNITS:
        if n_bytes < 1000 or unit == UNITS[-1]:
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}"
