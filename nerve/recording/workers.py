"""CPU threads that solve spectra during training: how many, and their priority."""

import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from nerve.cores import allowed, memory, share_among_trials
from nerve.errors import MeasurementError

log = logging.getLogger(__name__)

NICENESS = 19
"""Priority of the workers, the lowest: training must not wait for them to start the GPU's work."""

SHARE_OF_HOST, COPIES, WAITING = 4, 4, 2
"""What is being solved may take one part in so many of the host's memory, where a thread has so
many times what it gets; and as much again may wait for a thread, with so many times that."""


def spare_workers(device: torch.device, n_processes: int = 1, n_bytes: int = 0) -> int:
    """Threads that can solve beside training on `device`: the cores of this process, shared with
    the other training processes of the host, but one; not more than the memory is for. 0 where the
    cores train. On a GPU there is at least one, which takes what training leaves of the cores.

    A trial beside others has one more than its cores: its thread that trains sleeps most of the
    time (`Pace`), and its cores are rounded down.

    Args:
        device: where the model trains.
        n_processes: that train on this host.
        n_bytes: what an eigenproblem takes on its way to the host.
    """
    if device.type != "cuda":
        return 0
    share = share_among_trials()
    spare = (allowed() // n_processes - 1) if share is None else share + 1
    return max(1, min(spare, _by_memory(n_processes, COPIES * n_bytes)))


def waiting_on_host(n_processes: int, n_bytes: int) -> int:
    """How many eigenproblems may wait on the host for a thread, as its memory is. Arguments as of
    `spare_workers`."""
    return _by_memory(n_processes, WAITING * n_bytes)


def _by_memory(n_processes: int, n_bytes: int) -> int:
    """For how many of `n_bytes` there is memory here."""
    share = share_among_trials()
    n_beside = n_processes if share is None else max(1, allowed() // share)
    return memory() // (SHARE_OF_HOST * n_beside * max(n_bytes, 1))


def pool_of(n_workers: int) -> ThreadPoolExecutor:
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
            f"Spectra are solved by {n_workers} background threads, which could not be started: "
            f"{reason}. Raise the limit of threads (ulimit -u), or give this process fewer cores "
            "(taskset)."
        ) from error
    finally:
        torch.set_num_threads(n_threads)
    if refusals:
        log.warning(
            "the threads that solve spectra cannot lower their priority, and compete with "
            "training: %s",
            str(refusals[0]),
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
