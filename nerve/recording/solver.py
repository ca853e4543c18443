"""Solves the problems of measurements beside training, and gives their spectra in order."""

import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from nerve.cores import allowed, share_among_cells
from nerve.errors import MeasurementError
from nerve.measuring.eigenproblem import FFNProblem, FFNSpectra

LEAST_WORKERS = 4
"""With fewer spare cores than this a GPU solves its own problems sooner than the host would."""

NICENESS = 19
"""Priority of the workers, the lowest: training must not wait for them to start the GPU's work."""

MOST_PENDING = 2
"""Measurements that may wait for their solution; one more waits for the oldest of them."""

Labels = dict[str, Any]


@dataclass(frozen=True)
class Solved:
    """A measurement's labels (its step, losses, …) and the spectra of its FFNs."""

    labels: Labels
    spectra: list[FFNSpectra]


class Solver:
    """Takes a measurement's problems and gives their solutions, in the order of measurements.

    Problems of a GPU are copied to the host beside its work and solved there, one thread a problem,
    while training goes on. Without spare cores, or on the CPU, whose cores train, they are solved
    where they lie, at once.

    Of several processes each submits its share of a measurement's problems: process r of n every
    n-th, from number r on. Process 0 gets the spectra of all, the others their own. They exchange
    them in `submit` and `drain`, which every process must call alike.

    Args:
        device: where the model trains.
        n_workers: threads; 0 solves in place.
    """

    def __init__(self, device: torch.device, n_workers: int = 0) -> None:
        self.n_workers = n_workers
        self._pending: deque[tuple[Labels, list[tuple[FFNProblem, Future[FFNSpectra]]]]] = deque()
        self._pool = _single_threaded(self.n_workers) if self.n_workers else None
        self._stream = torch.cuda.Stream(device) if self._pool and device.type == "cuda" else None
        grouped = dist.is_available() and dist.is_initialized()
        self._rank, self._n_processes = (
            (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        )

    def submit(self, labels: Labels, problems: Sequence[FFNProblem]) -> Iterator[Solved]:
        """Takes a measurement; gives what is solved by then, having waited if too much is pending.

        Raises:
            MeasurementError: for a problem that could not be solved, with its layer and step.
        """
        waiting = []
        for problem in problems:
            on_host = problem.to_host(self._stream) if self._stream else problem
            waiting.append((on_host, self._start(on_host)))
        self._pending.append((labels, waiting))
        while len(self._pending) > (MOST_PENDING if self._pool else 0):
            yield self._oldest()
        yield from self.finished()

    def finished(self) -> Iterator[Solved]:
        """Gives the measurements that are solved, without waiting; nothing where other processes
        would have to be waited for. Raises as `submit`."""
        while (
            self._n_processes == 1
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

    def _start(self, problem: FFNProblem) -> Future[FFNSpectra]:
        if self._pool:
            return self._pool.submit(problem.solve)
        future: Future[FFNSpectra] = Future()
        try:
            future.set_result(problem.solve())
        except Exception as error:
            future.set_exception(error)
        return future

    def _oldest(self) -> Solved:
        labels, waiting = self._pending.popleft()
        spectra: list[FFNSpectra] = []
        error: MeasurementError | None = None
        for problem, future in waiting:
            try:
                spectra.append(future.result())
            except Exception as cause:
                error = MeasurementError(
                    f"The spectra of {problem.ffn} in layer {problem.layer} at step "
                    f"{labels.get('step')} could not be solved: {cause}"
                )
                error.__cause__ = cause
        if self._n_processes > 1:
            spectra, error = self._shared(spectra, error)
        if error is not None:
            raise error
        return Solved(labels, spectra)

    def _shared(
        self, mine: list[FFNSpectra], error: MeasurementError | None
    ) -> tuple[list[FFNSpectra], MeasurementError | None]:
        """The spectra of all processes in the order of the problems, in process 0; and the first
        error of any process, in each of them."""
        told = [None if error is None else str(error)] * self._n_processes
        dist.all_gather_object(told, told[0])
        shares: list[Any] | None = [None] * self._n_processes if self._rank == 0 else None
        dist.gather_object(mine, shares)
        if error is None:
            error = next((MeasurementError(text) for text in told if text is not None), None)
        if shares is None:
            return mine, error
        in_turns = itertools.chain.from_iterable(itertools.zip_longest(*shares))
        return [spectra for spectra in in_turns if spectra is not None], error


def spare_workers(device: torch.device, n_processes: int = 1) -> int:
    """Threads that can solve beside training on `device`: the cores of this process, shared with
    the other training processes of the host, but one.

    0 where the cores train, or are so few that a GPU of its own is sooner done. A cell of a sweep
    that runs beside others has at least one: on a GPU that they share it would hold them up.
    """
    if device.type != "cuda":
        return 0
    share = share_among_cells()
    if share is not None:
        return max(1, share // n_processes - 1)
    cores = allowed() // n_processes
    return cores - 1 if cores > LEAST_WORKERS else 0


def _single_threaded(n_workers: int) -> ThreadPoolExecutor:
    """A pool whose threads each use one core in torch, and give way to those that train.

    The number of threads that torch sets in a thread is that thread's own, and the default of
    threads to come; it is set back for those.
    """
    n_threads = torch.get_num_threads()
    started = threading.Barrier(n_workers + 1)

    def start() -> None:
        torch.get_num_threads()  # the first call in a thread takes over the default, and once only
        torch.set_num_threads(1)
        if sys.platform == "linux":  # where a priority is that of a thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        started.wait()

    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="spectra", initializer=start)
    for _ in range(n_workers):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(n_threads)
    return pool
