"""Solves the eigenproblems of measurements beside training, and gives their rows in order."""

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nerve.cores import allowed, share_among_trials
from nerve.errors import MeasurementError
from nerve.measuring.distributed import dealt_back, gathered, n_processes
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.measuring.group_spectra import GroupEigenproblem, GroupSpectrum, pooled_spectra

log = logging.getLogger(__name__)

LEAST_WORKERS = 4
"""With fewer spare cores than this a GPU solves its own eigenproblems sooner than the host does."""

NICENESS = 19
"""Priority of the workers, the lowest: training must not wait for them to start the GPU's work."""

MOST_PENDING = 2
"""Measurements that may wait for their solution; one more waits for the oldest of them."""

Labels = dict[str, Any]

Eigenproblem = FFNEigenproblem | GroupEigenproblem


@dataclass(frozen=True)
class Solved:
    """A measurement's labels (its step, losses, …), the spectra of its FFNs, and those of groups
    and sites where they were measured."""

    labels: Labels
    spectra: list[FFNSpectra]
    groups: Sequence[GroupSpectrum] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Those of the `metrics` table."""
        return [self.labels | spectra.row() for spectra in self.spectra]

    @property
    def group_rows(self) -> list[dict[str, Any]]:
        """Those of the `groups` table: with pre and post of all samples, where there are others."""
        if not self.groups:
            return []
        step = {"step": self.labels["step"]}
        pooled = [each for spectra in self.spectra for each in pooled_spectra(spectra)]
        return [step | each.row() for each in (*pooled, *self.groups)]


class Solver:
    """Takes a measurement's eigenproblems and gives their solutions, in the order of measurements.

    Those of a GPU are copied to the host beside its work and solved there, one thread for each of
    them, while training goes on. Without spare cores, or on the CPU, whose cores train, they are
    solved where they lie, at once.

    Of several processes each submits its share of a measurement's eigenproblems: process r of n
    every n-th, from number r on. Process 0 gets the spectra of all, the others their own. They
    exchange them in `submit` and `drain`, which every process must call alike.

    Args:
        device: where the model trains.
        n_workers: threads; 0 solves in place.
    """

    def __init__(self, device: torch.device, n_workers: int = 0) -> None:
        self.n_workers = n_workers
        self._pending: deque[tuple[Labels, list[tuple[Eigenproblem, Future[Any]]]]] = deque()
        self._pool = _single_threaded(self.n_workers) if self.n_workers else None
        self._stream = torch.cuda.Stream(device) if self._pool and device.type == "cuda" else None
        self._shares = n_processes() > 1

    def submit(self, labels: Labels, eigenproblems: Sequence[Eigenproblem]) -> Iterator[Solved]:
        """Takes a measurement at once; gives what is solved by then, after waiting if too much is
        pending.

        Raises:
            MeasurementError: for one that could not be solved, with its layer and step.
        """
        waiting = []
        for eigenproblem in eigenproblems:
            on_host = eigenproblem.to_host(self._stream) if self._stream else eigenproblem
            waiting.append((on_host, self._start(on_host)))
        self._pending.append((labels, waiting))
        return self._solved_by_now()

    def _solved_by_now(self) -> Iterator[Solved]:
        while len(self._pending) > (MOST_PENDING if self._pool else 0):
            yield self._oldest()
        yield from self.finished()

    def finished(self) -> Iterator[Solved]:
        """Gives the measurements that are solved, without waiting; nothing where other processes
        would have to be waited for. Raises as `submit`."""
        while (
            not self._shares
            and self._pending
            and all(future.done() for _, future in self._pending[0][1])
        ):
            yield self._oldest()

    def drain(self) -> Iterator[Solved]:
        """Waits for all measurements, and gives them. Raises as `submit`."""
        while self._pending:
            yield self._oldest()

    def close(self) -> None:
        """Ends the threads; what is still pending is dropped."""
        self._pending.clear()
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def _start(self, eigenproblem: Eigenproblem) -> Future[Any]:
        if self._pool:
            return self._pool.submit(eigenproblem.solve)
        future: Future[Any] = Future()
        try:
            future.set_result(eigenproblem.solve())
        except Exception as error:
            future.set_exception(error)
        return future

    def _oldest(self) -> Solved:
        labels, waiting = self._pending.popleft()
        spectra: list[FFNSpectra] = []
        groups: list[GroupSpectrum] = []
        error: MeasurementError | None = None
        for eigenproblem, future in waiting:
            try:
                result = future.result()
                (spectra if isinstance(result, FFNSpectra) else groups).append(result)
            except Exception as cause:
                error = MeasurementError(
                    f"The spectra of {eigenproblem.ffn} in layer {eigenproblem.layer} at "
                    f"step {labels.get('step')} could not be solved: {cause}"
                )
                error.__cause__ = cause
        if self._shares:
            told = gathered(None if error is None else str(error))
            spectra, groups = dealt_back(spectra), dealt_back(groups)
            if error is None:
                error = next((MeasurementError(text) for text in told if text is not None), None)
        if error is not None:
            raise error
        return Solved(labels, spectra, groups)


def spare_workers(device: torch.device, n_processes: int = 1) -> int:
    """Threads that can solve beside training on `device`: the cores of this process, shared with
    the other training processes of the host, but one.

    0 where the cores train, or are so few that a GPU of its own is sooner done. A trial of a sweep
    that runs beside others has at least one: on a GPU that they share it would hold them up.
    """
    if device.type != "cuda":
        return 0
    share = share_among_trials()
    if share is not None:
        return max(1, share // n_processes - 1)
    cores = allowed() // n_processes
    return cores - 1 if cores > LEAST_WORKERS else 0


def _single_threaded(n_workers: int) -> ThreadPoolExecutor:
    """A pool whose threads each use one core in torch, and give way to those that train.

    The number of threads that torch sets in a thread is that thread's own, and the default of
    threads to come; it is set back for those.

    Raises:
        MeasurementError: where the threads cannot be started.
    """
    n_threads = torch.get_num_threads()
    started = threading.Barrier(n_workers + 1)
    refusals: list[Exception] = []

    def start() -> None:
        try:
            torch.get_num_threads()  # the first call in a thread takes the default over, and once
            torch.set_num_threads(1)
            _give_way(refusals)
        except BaseException as error:
            refusals.append(MeasurementError(f"{type(error).__name__}: {error}"))
            started.abort()  # else all others wait for this one
            raise
        started.wait()

    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="spectra", initializer=start)
    try:
        for _ in range(n_workers):
            pool.submit(int)
        started.wait()
    except (RuntimeError, threading.BrokenBarrierError) as error:
        started.abort()
        pool.shutdown(cancel_futures=True)
        reason = next((each for each in refusals if isinstance(each, MeasurementError)), error)
        raise MeasurementError(
            f"Spectra are solved by {n_workers} threads beside training, which could not be "
            f"started: {reason}. Raise the limit of threads (ulimit -u), or leave fewer cores to "
            "this process (taskset)."
        ) from error
    finally:
        torch.set_num_threads(n_threads)
    if refusals:
        log.warning(
            "the threads that solve spectra may not lower their priority, and compete with those "
            "that train: %s",
            refusals[0],
        )
    return pool


def _give_way(refusals: list[Exception]) -> None:
    """Lowers the priority of this thread, which a sandbox may refuse."""
    if sys.platform != "linux":  # where a priority is that of a thread
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as refused:
        refusals.append(refused)
