"""A thread that ends a fit for which another process of the run is needed and has failed."""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

GIVES_UP_AFTER_S = 30.0
"""How long a fit may continue without such a process. An exchange of nerve's own or of gloo fails
by itself; one of NCCL would wait for half an hour."""

POLL_S = 0.1


@contextmanager
def watching(look: Callable[[], bool], give_up: Callable[[], None]) -> Iterator[None]:
    """Watches other processes while the block runs, and ends this process with status 1 if the
    block does not end within `GIVES_UP_AFTER_S` seconds after one of them has failed.

    Args:
        look: whether one of them has failed; called by a thread, ten times a second.
        give_up: called by that thread before this process ends.
    """
    ended = threading.Event()

    def watch() -> None:
        if _is_waiting(look, ended):
            try:
                give_up()
            finally:
                os._exit(1)  # whatever its other threads wait for

    thread = threading.Thread(target=watch, name="other-processes", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_waiting(look: Callable[[], bool], ended: threading.Event) -> bool:
    """Watches until the block ends; returns True if it has not ended in time."""
    until = math.inf
    while not ended.wait(POLL_S):
        if look():
            until = min(until, time.monotonic() + GIVES_UP_AFTER_S)
        if time.monotonic() >= until:
            return True
    return False
