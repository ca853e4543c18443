"""Decides whether the host or the GPU solves each eigenproblem, from the time that each takes."""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

Processor = Literal["host", "device"]

HOST_S = 6e-11
DEVICE_S = 3e-12
"""Initial estimates of seconds per cube of the width, until they are measured: for one core (1.5 s
at 3072), and for a data-center GPU (.08 s, with training running)."""

FIRST_S = 10.0
"""Time that the host may spend on the first measurement, when the time to the next one is
unknown."""

_ROOM = 1.5
"""Work pending on the host must be finishable within this many intervals between measurements.
Above 1, because some work may still be pending at the next measurement; not much above, or training
would wait."""
_MEASUREMENTS = 3
"""Solving times are medians over the solutions of this many measurements, so that nothing moves to
the GPU, where it would take time from training, when the machine is busy with something else for a
moment."""


class Placement:
    """Decides for each eigenproblem whether the host or the GPU solves it.

    The host gets as much as it can solve between measurements, since that costs training nothing.
    The rest goes to the GPU, where it takes time from training; or to the host as well, if the GPU
    would be slower than all threads together. The times are measured in this run, under its actual
    load, over the latest measurements; the interval between measurements is that of the last two.

    Args:
        n_threads: number of host threads.
        clock: returns seconds.
    """

    def __init__(self, n_threads: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._n_threads = n_threads
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[Processor, list[float]] = {"host": [HOST_S], "device": [DEVICE_S]}
        self._n_newest = 1
        self._pending = 0.0
        self._last: float | None = None

    def choose(self, works: Sequence[float]) -> list[Processor]:
        """Chooses a processor for each eigenproblem of a new measurement.

        Args:
            works: the cost of each: the sum of the cubes of its matrices' widths.
        """
        now = self._clock()
        with self._lock:
            room = self._room(now)
            host_takes_all = self._n_threads and (
                self._typical("device") > self._typical("host") / self._n_threads
            )
            processors: list[Processor] = []
            for work in works:
                fits = bool(self._n_threads) and self._pending + work <= room
                processors.append("host" if fits or host_takes_all else "device")
                if processors[-1] == "host":
                    self._pending += work
            self._last, self._n_newest = now, len(works)
        return processors

    def solved(self, processor: Processor, work: float, seconds: float | None) -> None:
        """Records that one is solved, and how long it took; None if it failed."""
        with self._lock:
            if processor == "host":
                self._pending -= work
            if seconds is not None:
                latest = [*self._seconds[processor], seconds / work]
                self._seconds[processor] = latest[-_MEASUREMENTS * max(1, self._n_newest) :]

    def _typical(self, processor: Processor) -> float:
        """Seconds per unit of work."""
        return statistics.median(self._seconds[processor])

    def _room(self, now: float) -> float:
        """How much more work may be pending on the host."""
        seconds = FIRST_S if self._last is None else _ROOM * (now - self._last)
        return seconds * self._n_threads / self._typical("host")
