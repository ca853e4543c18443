"""Chooses where each eigenproblem is solved: on CPU threads in the background, on the GPU between
its other work, or at once."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from nerve.measuring.eigenproblem import (
    FFNEigenproblem,
    FFNSpectra,
    GroupEigenproblem,
    GroupSpectrum,
)
from nerve.measuring.processes import n_processes
from nerve.recording.placement import Placement, Processor
from nerve.recording.staging import Staging
from nerve.recording.workers import pool_of, waiting_on_host

log = logging.getLogger(__name__)

Eigenproblem = FFNEigenproblem | GroupEigenproblem

LOWEST = 0
"""CUDA's lowest priority. Training's stream has it, too, by default; a higher one there would not
make solving cost training less (benchmarks/priority.py)."""


class Untaken:
    """An eigenproblem until a thread takes it; it may be copied to the host before then."""

    def __init__(self, eigenproblem: Eigenproblem) -> None:
        self._lock = threading.Lock()
        self._held: Eigenproblem | None = eigenproblem
        self.is_copied = False

    def take(self) -> Eigenproblem:
        """Returns the eigenproblem and drops the reference, so that GPU memory is freed once it is
        copied."""
        with self._lock:
            held, self._held = self._held, None
        assert held is not None
        return held

    def copy(self, to_host: Callable[[Eigenproblem], Eigenproblem]) -> None:
        """Replaces it by a copy, unless it has been taken."""
        with self._lock:
            if self._held is not None:
                self._held = to_host(self._held)
                self.is_copied = True

    @property
    def n_bytes(self) -> int:
        """The device memory it occupies."""
        held = self._held
        return 0 if held is None or self.is_copied else matrix_bytes(held)


class Waiting(NamedTuple):
    """The name of an FFN for messages, its eigenproblem, and the future of its spectra."""

    name: str
    untaken: Untaken
    future: Future[Any]

    @property
    def n_bytes(self) -> int:
        """The device memory it occupies until it is taken."""
        return self.untaken.n_bytes


class Dispatch:
    """Solves each eigenproblem of a GPU where that costs less (`Placement`) while training goes on:
    on the host, one thread per eigenproblem, after copying it there, or on the GPU, between its
    other work. Eigenproblems of a CPU, whose cores train, are solved at once.

    Those assigned to the host are copied as long as host memory allows, even before a thread is
    free: runs that share a GPU have few threads each, and GPU memory is their scarcest resource.

    Args:
        device: where the model trains.
        n_workers: number of host threads; 0 solves on `device`.
        n_bytes: expected host memory of an eigenproblem, which is allocated now, while training
            starts.
    """

    def __init__(self, device: torch.device, n_workers: int, n_bytes: int) -> None:
        self.n_workers = n_workers
        self._device = device
        self._pool = pool_of(n_workers) if n_workers else None
        is_gpu = device.type == "cuda"
        self._of_gpu = ThreadPoolExecutor(1, thread_name_prefix="spectra-gpu") if is_gpu else None
        self._stream = torch.cuda.Stream(device, priority=LOWEST) if is_gpu else None
        self._staging = Staging(device)
        self._placement = Placement(n_workers)
        self._last_counts: Counter[Processor] = Counter()
        self._copier = pool_of(1) if self._pool and is_gpu else None
        self._room = threading.Semaphore(waiting_on_host(n_processes(), n_bytes))
        if self._copier:
            # If pinning fails here, it is tried again where it is needed, and fails there.
            self._copier.submit(self._staging.reserve, n_bytes)

    @property
    def is_beside(self) -> bool:
        """Whether anything is solved concurrently with training."""
        return bool(self._pool or self._of_gpu)

    def start(self, eigenproblems: Sequence[Eigenproblem], step: Any) -> list[Waiting]:
        """Queues the eigenproblems of a measurement, to be solved once the device has computed
        them.

        Args:
            step: the step of the measurement, for the log.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        works = [work_of(each) for each in eigenproblems]
        if self._of_gpu:
            processors = self._placement.choose(works)
        else:
            processors = ["host" if self._pool else "device"] * len(works)
        self._log_processors(processors, step)
        has_groups = any(isinstance(each, GroupEigenproblem) for each in eigenproblems)
        waiting = []
        for eigenproblem, work, processor in zip(eigenproblems, works, processors, strict=True):
            name = f"{eigenproblem.ffn} in layer {eigenproblem.layer}"
            untaken = Untaken(eigenproblem)
            task = partial(self._solve, untaken, processor, work, ready, has_groups)
            waiting.append(Waiting(name, untaken, self._begun(task, processor)))
            if self._copier and processor == "host":
                self._copier.submit(self._copy, untaken, ready)
        return waiting

    def close(self) -> None:
        """Ends the threads and drops what none of them has started."""
        pools = [pool for pool in (self._pool, self._of_gpu, self._copier) if pool]
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)  # also where the wait is interrupted
        for pool in pools:
            pool.shutdown()

    def _begun(self, task: Callable[[], Any], processor: Processor) -> Future[Any]:
        pool = self._pool if processor == "host" else self._of_gpu
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
        untaken: Untaken,
        processor: Processor,
        work: float,
        ready: torch.cuda.Event | None,
        has_groups: bool,
    ) -> FFNSpectra | GroupSpectrum:
        began, seconds = time.monotonic(), None
        try:
            if processor == "host" and self._stream is not None:
                problem = untaken.take()
                if untaken.is_copied:
                    self._room.release()
                else:
                    problem = self._staging.to_host(problem, ready)
                spectra = problem.solve()
            else:
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    if self._stream is not None and ready is not None:
                        self._stream.wait_event(ready)
                    spectra = untaken.take().solve()
            # Many small operations, done here to spare the training thread.
            spectra.row()
            if has_groups and isinstance(spectra, FFNSpectra):
                for each in spectra.pooled:
                    each.row()
            seconds = time.monotonic() - began
        finally:
            self._placement.solved(processor, work, seconds)
        return spectra

    def _copy(self, untaken: Untaken, ready: torch.cuda.Event | None) -> None:
        """Copies it ahead of the thread that solves it; if this fails, that thread copies it."""
        if self._room.acquire(blocking=False):
            try:
                untaken.copy(partial(self._staging.to_host, ready=ready))
            finally:
                if not untaken.is_copied:
                    self._room.release()

    def _log_processors(self, processors: Sequence[Processor], step: Any) -> None:
        """Logs where the eigenproblems are solved whenever that changes; nothing if all are solved
        at once."""
        counted = Counter(processors)
        if self.is_beside and counted != self._last_counts:
            self._last_counts = counted
            log.info(
                "solving the spectra of step %s in the background: %s on %s CPU threads, %s on %s",
                step,
                counted["host"],
                self.n_workers,
                counted["device"],
                self._device,
            )


def work_of(eigenproblem: Eigenproblem) -> float:
    """The cost of solving it: the sum of the cubes of its matrices' widths."""
    if isinstance(eigenproblem, GroupEigenproblem):
        return float(len(eigenproblem.matrix)) ** 3
    return float(len(eigenproblem.before)) ** 3 + float(len(eigenproblem.post)) ** 3


def matrix_bytes(eigenproblem: Eigenproblem) -> int:
    """The memory of its matrices."""
    if isinstance(eigenproblem, GroupEigenproblem):
        return eigenproblem.matrix.nbytes
    return eigenproblem.before.nbytes + eigenproblem.post.nbytes
