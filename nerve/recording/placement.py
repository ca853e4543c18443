"""Decides whether the host or the GPU solves each eigenproblem, from the time that each takes."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

Place = Literal["host", "device"]

HOST_S = 6e-11
DEVICE_S = 3e-12
"""Initial estimates of seconds per cube of the width, until they are measured: for one core (1.5 s
at 3072), and for a data-center GPU (.08 s, with training running)."""

FIRST_S = 10.0
"""Time that the host may spend on the first measurement, when the time to the next one is
unknown."""

_ROOM = 1.5
"""Work pending on the host must be finishable within this many intervals between measurements: more
than one, because the next measurement may find some pending, and fewer than would make training
wait."""
_MEASUREMENTS = 3.0
"""Solving times are means over about this many of the latest measurements: one during which the
machine was busy with something else moves nothing to the GPU, which would cost training more."""


class _Rate:
    """The time that a place takes per unit of work: a running mean, weighted by the work.

    Args:
        seconds: an estimate, which counts as much as the first solution.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._weight = 0.0

    def add(self, seconds: float, work: float, most: float) -> None:
        """Counts a solution.

        Args:
            most: the work over which the mean is taken.
        """
        self._weight = min((self._weight or work) + work, max(most, work))
        self.seconds += work / self._weight * (seconds / work - self.seconds)


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
        self._rates: dict[Place, _Rate] = {"host": _Rate(HOST_S), "device": _Rate(DEVICE_S)}
        self._newest = math.inf
        self._pending = 0.0
        self._last: float | None = None

    def choose(self, works: Sequence[float]) -> list[Place]:
        """Chooses a place for each eigenproblem of a new measurement.

        Args:
            works: the cost of each: the sum of the cubes of its matrices' widths.
        """
        now = self._clock()
        with self._lock:
            room = self._room(now)
            host_takes_all = self._n_threads and (
                self._rates["device"].seconds > self._rates["host"].seconds / self._n_threads
            )
            places: list[Place] = []
            for work in works:
                fits = bool(self._n_threads) and self._pending + work <= room
                places.append("host" if fits or host_takes_all else "device")
                if places[-1] == "host":
                    self._pending += work
            self._last, self._newest = now, sum(works)
        return places

    def solved(self, place: Place, work: float, seconds: float | None) -> None:
        """Records that one is solved, and how long it took; None if it failed."""
        with self._lock:
            if place == "host":
                self._pending -= work
            if seconds is not None:
                self._rates[place].add(seconds, work, _MEASUREMENTS * self._newest)

    def _room(self, now: float) -> float:
        """How much more work may be pending on the host."""
        seconds = FIRST_S if self._last is None else _ROOM * (now - self._last)
        return seconds * self._n_threads / self._rates["host"].seconds
