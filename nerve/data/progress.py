"""Logs the progress of a long pass over a corpus, from a thread: `nerve.progress` shows that of
work that reports it step by step."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

EVERY_S = 10.0


@contextmanager
def progress(doing: str, n_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Logs the progress and the elapsed time of the block every `EVERY_S` seconds.

    A thread does this, because calls within the block may take minutes. Nothing is logged for a
    block that takes less than `EVERY_S`.

    Args:
        doing: what the block does.
        n_bytes: the total number of bytes, if it is known.

    Yields:
        A function to be called with the number of bytes that were just processed.
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
    """The texts; `add` is called with the bytes of each when the next one is requested."""
    for text in texts:
        yield text
        add(len(text.encode()))


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
