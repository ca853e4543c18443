"""CPU threads that solve spectra during training: how many, and their priority."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from nerve.cores import allowed, memory, share_among_trials
from nerve.errors import MeasurementError
from nerve.shared_context import SharedContext

log = logging.getLogger(__name__)

NICENESS = 19
"""Priority of the workers, the lowest: training must not wait behind them to launch the GPU's
work."""

SHARE_OF_HOST, COPIES, WAITING = 4, 4, 2
"""Eigenproblems being solved may take 1/`SHARE_OF_HOST` of the host's memory, at `COPIES` times
their size; those that wait for a thread may take as much again, at `WAITING` times their size."""


def spare_workers(device: torch.device, n_processes: int = 1, n_bytes: int = 0) -> int:
    """Number of threads that can solve while `device` trains: the cores of this process, shared
    with the other training processes on the host, minus one, limited by memory. 0 if the cores
    train. With a GPU there is at least one, which uses the core time that training leaves.

    A trial that shares the machine gets one more than its cores: its training thread sleeps most of
    the time (`Pace`), and its number of cores is rounded down.

    Args:
        device: where the model trains.
        n_processes: number of training processes on this host.
        n_bytes: size of an eigenproblem when it is copied to the host.
    """
    if device.type != "cuda":
        return 0
    share = share_among_trials()
    spare = (allowed() // n_processes - 1) if share is None else share + 1
    return max(1, min(spare, _by_memory(n_processes, COPIES * n_bytes)))


def waiting_on_host(n_processes: int, n_bytes: int) -> int:
    """How many eigenproblems may wait on the host for a thread, given its memory. The arguments are
    those of `spare_workers`."""
    return _by_memory(n_processes, WAITING * n_bytes)


def _by_memory(n_processes: int, n_bytes: int) -> int:
    """How many eigenproblems of `n_bytes` fit into memory."""
    share = share_among_trials()
    n_beside = n_processes if share is None else max(1, allowed() // share)
    return memory() // (SHARE_OF_HOST * n_beside * max(n_bytes, 1))


def pool_of(n_workers: int) -> ThreadPoolExecutor:
    """A pool whose threads each use one core in torch, at lower priority than those that train.

    Raises:
        MeasurementError: if the threads cannot be started.
    """
    started = threading.Barrier(n_workers + 1)
    refusals: list[Exception] = []

    def start() -> None:
        try:
            torch.get_num_threads()  # a thread's first call, and only that, adopts the default
            torch.set_num_threads(1)
            _give_way(refusals)
        except BaseException as error:
            refusals.append(MeasurementError(f"{type(error).__name__}: {error}"))
            started.abort()  # otherwise all others wait for this one
            raise
        started.wait()

    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="spectra", initializer=start)
    with _numbers_restored():
        try:
            for _ in range(n_workers):
                pool.submit(int)
            started.wait()
        except (RuntimeError, threading.BrokenBarrierError) as error:
            started.abort()
            pool.shutdown(cancel_futures=True)
            reason = next((each for each in refusals if isinstance(each, MeasurementError)), error)
            raise MeasurementError(
                f"Spectra are solved by {n_workers} background threads, which could not be "
                f"started: {reason}. Raise the limit on threads (ulimit -u), or give this process "
                "fewer cores (taskset)."
            ) from error
    if refusals:
        log.warning(
            "the threads that solve spectra cannot lower their priority and will compete with "
            "training: %s",
            str(refusals[0]),
        )
    return pool


@contextmanager
def _numbers_restored() -> Iterator[None]:
    """Restores torch's default number of threads, and that of this thread."""
    own = torch.get_num_threads()
    try:
        with _default_restored():
            yield
    finally:
        if torch.get_num_threads() != own:  # the default of a thread that came first
            torch.set_num_threads(own)


@SharedContext
@contextmanager
def _default_restored() -> Iterator[None]:
    """The number of threads that torch sets in a thread applies to that thread and becomes the
    default of later ones. Afterwards, the default is the number of this thread again."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _give_way(refusals: list[Exception]) -> None:
    """Lowers the priority of this thread; a sandbox may refuse."""
    if sys.platform != "linux":  # only there do threads have their own priority
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    except OSError as refused:
        refusals.append(refused)
