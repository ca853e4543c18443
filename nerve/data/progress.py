"""How far a long pass over a corpus is, in the log."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

EVERY_S = 10.0


@contextmanager
def progress(doing: str, n_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Says every `EVERY_S` seconds, until the block ends, how far it is and how long it has taken.

    A thread says it: what the block calls may not come back for minutes. Nothing is said of a block
    that takes less.

    Args:
        doing: what the block does.
        n_bytes: how much there is, where that is known.

    Yields:
        What is to be called with the bytes that another step has dealt with.
    """
    start, done, ended = time.monotonic(), 0, threading.Event()

    def add(n: int) -> None:
        nonlocal done
        done += n

    def say() -> None:
        while not ended.wait(EVERY_S):
            of = f" of {_megabytes(n_bytes)}" if n_bytes is not None else ""
            log.info("%s: %s%s, %.0f s", doing, _megabytes(done), of, time.monotonic() - start)

    thread = threading.Thread(target=say, name="progress", daemon=True)
    thread.start()
    try:
        yield add
    finally:
        ended.set()
        thread.join()


def counted(texts: Iterable[str], add: Callable[[int], None]) -> Iterator[str]:
    """The texts, each counted by its bytes when the next one is asked for."""
    for text in texts:
        yield text
        add(len(text.encode()))


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
