"""Has single eigenproblems solved: by threads of the host, on the device, or at once."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from nerve.measuring.eigenproblem import FFNSpectra, GroupSpectrum
from nerve.recording.place import Eigenproblem, Place, Placement, bytes_of, work_of
from nerve.recording.staging import Staging
from nerve.recording.workers import pool_of

log = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """An FFN as messages name it, its eigenproblem until a thread takes it, and its spectra to
    come."""

    name: str
    untaken: list[Eigenproblem]
    future: Future[Any]

    @property
    def n_bytes(self) -> int:
        """What it takes of the device while nobody has taken it."""
        return sum(map(bytes_of, tuple(self.untaken)))


class Dispatch:
    """Solves each eigenproblem of a GPU where that costs less (`Placement`), while training goes
    on: copied to the host and solved there, one thread for each of them, or on the GPU, between its
    other work. Those of a CPU, whose cores train, are solved at once.

    Args:
        device: where the model trains.
        n_workers: threads of the host; 0 solves on `device`.
        n_bytes: what an eigenproblem is expected to take on the host: room for it is made now,
            beside what comes first.
    """

    def __init__(self, device: torch.device, n_workers: int, n_bytes: int) -> None:
        self.n_workers = n_workers
        self._device = device
        self._pool = pool_of(n_workers) if n_workers else None
        is_gpu = device.type == "cuda"
        self._of_gpu = ThreadPoolExecutor(1, thread_name_prefix="spectra-gpu") if is_gpu else None
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._staging = Staging(device)
        self._placement = Placement(n_workers)
        self._said: Counter[Place] = Counter()
        if self._pool and is_gpu:
            # What it cannot pin is asked for again, and refused, where it is needed.
            self._pool.submit(self._staging.reserve, n_bytes)

    @property
    def is_beside(self) -> bool:
        """Whether anything is solved beside training."""
        return bool(self._pool or self._of_gpu)

    def start(self, eigenproblems: Sequence[Eigenproblem], step: Any) -> list[Waiting]:
        """Has the eigenproblems of a measurement solved, once the device has made them.

        Args:
            step: of the measurement, for the log.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        works = [work_of(each) for each in eigenproblems]
        if self._of_gpu:
            places = self._placement.choose(works)
        else:
            places = ["host" if self._pool else "device"] * len(works)
        self._say(places, step)
        waiting = []
        for eigenproblem, work, place in zip(eigenproblems, works, places, strict=True):
            name = f"{eigenproblem.ffn} in layer {eigenproblem.layer}"
            # What solves it takes it from the list, so that a GPU's memory is free once copied.
            untaken = [eigenproblem]
            task = partial(self._solve, untaken, place, work, ready)
            waiting.append(Waiting(name, untaken, self._begun(task, place)))
        return waiting

    def close(self) -> None:
        """Ends the threads; what none of them has begun is dropped."""
        pools = [pool for pool in (self._pool, self._of_gpu) if pool]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)  # also where the wait is interrupted
        for pool in pools:
            pool.shutdown()

    def _begun(self, task: Callable[[], Any], place: Place) -> Future[Any]:
        pool = self._pool if place == "host" else self._of_gpu
        if pool:
            return pool.submit(task)
        future: Future[Any] = Future()
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
        return future

    def _solve(
        self,
        untaken: list[Eigenproblem],
        place: Place,
        work: float,
        ready: torch.cuda.Event | None,
    ) -> FFNSpectra | GroupSpectrum:
        began, seconds = time.monotonic(), None
        try:
            if place == "host" and self._stream is not None:
                spectra = self._staging.to_host(untaken.pop(), ready).solve()
            else:
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    if self._stream is not None and ready is not None:
                        self._stream.wait_event(ready)
                    spectra = untaken.pop().solve()
            seconds = time.monotonic() - began
        finally:
            self._placement.solved(place, work, seconds)
        return spectra

    def _say(self, places: Sequence[Place], step: Any) -> None:
        """Logs where the eigenproblems go, when that changes."""
        counted = Counter(places)
        if counted != self._said:
            self._said = counted
            log.info(
                "of the %s spectra of step %s, %s are solved by %s threads of the host beside "
                "training, %s on %s",
                len(places),
                step,
                counted["host"],
                self.n_workers,
                counted["device"],
                self._device,
            )
