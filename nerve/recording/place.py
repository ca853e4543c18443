"""Where eigenproblems are solved: on the host beside training, or on the GPU, between its steps."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from nerve.measuring.eigenproblem import FFNEigenproblem, GroupEigenproblem

Eigenproblem = FFNEigenproblem | GroupEigenproblem
Place = Literal["host", "device"]

HOST_S = 6e-11
DEVICE_S = 3e-12
"""Seconds for each cube of a width until they are measured: of one core (1.5 s at 3072), and of a
GPU of a data center (.08 s, training beside it)."""

FIRST_S = 10.0
"""What the host may take for the first measurement, when nobody knows when the next one comes."""

_ROOM = 1.5
"""What is pending on the host is to be done within so many times between two measurements: more
than one, as the next one may find some pending, and fewer than training would wait for."""
_NEWEST = 0.3
"""What the last solution counts for in the mean of what they take."""


class Placement:
    """Decides for each eigenproblem whether the host or the GPU solves it.

    What the host can solve while measurements come as they do costs training nothing, and goes
    there. The rest goes to the GPU, where it takes its time from training, or, if the GPU is slower
    at it than all the threads are, to the host as well. Times are those that were measured here,
    beside everything else that runs; the time between measurements is that of the last two.

    Args:
        n_threads: of the host.
        clock: seconds.
    """

    def __init__(self, n_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._n_threads = n_threads
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[Place, float] = {"host": HOST_S, "device": DEVICE_S}
        self._pending = 0.0
        self._last: float | None = None

    def choose(self, works: Sequence[float]) -> list[Place]:
        """One for each eigenproblem of a measurement that has come now; see `work_of`."""
        now = self._clock()
        with self._lock:
            room = self._room(now)
            host_takes_all = self._n_threads and (
                self._seconds["device"] > self._seconds["host"] / self._n_threads
            )
            places: list[Place] = []
            for work in works:
                fits = bool(self._n_threads) and self._pending + work <= room
                places.append("host" if fits or host_takes_all else "device")
                if places[-1] == "host":
                    self._pending += work
            self._last = now
        return places

    def solved(self, place: Place, work: float, seconds: float | None) -> None:
        """Notes how long it took to solve one; None for one that failed."""
        with self._lock:
            if place == "host":
                self._pending -= work
            if seconds is not None:
                self._seconds[place] += _NEWEST * (seconds / work - self._seconds[place])

    def _room(self, now: float) -> float:
        """The work that may be pending on the host."""
        seconds = FIRST_S if self._last is None else _ROOM * (now - self._last)
        return seconds * self._n_threads / self._seconds["host"]


def work_of(eigenproblem: Eigenproblem) -> float:
    """What it costs to solve: the cubes of the widths of its matrices."""
    if isinstance(eigenproblem, GroupEigenproblem):
        return float(len(eigenproblem.matrix)) ** 3
    return float(len(eigenproblem.before)) ** 3 + float(len(eigenproblem.post)) ** 3


def bytes_of(eigenproblem: Eigenproblem) -> int:
    """What its matrices take."""
    if isinstance(eigenproblem, GroupEigenproblem):
        return eigenproblem.matrix.nbytes
    return eigenproblem.before.nbytes + eigenproblem.post.nbytes
