"""Shows the progress of a command or function that takes minutes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how much of it is done, and the total if it is known."""

INTERVAL_S = 5.0


def unseen(what: str, done: int, total: int | None) -> None:
    """Shows nothing."""


@contextmanager
def shown() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere lines for the log, one for each new task and one every few
    seconds during a task."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    description = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), description)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )


def _lines() -> Progress:
    last, at = "", -INTERVAL_S

    def tell(what: str, done: int, total: int | None) -> None:
        nonlocal last, at
        now = time.monotonic()
        if what != last or now - at >= INTERVAL_S:
            print(f"{done}/{'?' if total is None else total} {what}", file=sys.stderr)
            last, at = what, now

    return tell
