"""How work of minutes says where it is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int | None], None]
"""Told what is being done, how many of it are done, and of how many, where that is known."""

INTERVAL_S = 5.0


def unseen(what: str, done: int, total: int | None) -> None:
    """Tells nobody."""


@contextmanager
def shown() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere lines, so that a log says where it is: one for each thing that
    is done, and of what it is made of one every few seconds."""
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
