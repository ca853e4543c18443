"""Threads beside training: as many as fit, at low priority, or an error soon."""

import errno
import os
import sys
import threading

import pytest
import torch

from nerve.cores import SHARE
from nerve.errors import MeasurementError
from nerve.recording import workers
from nerve.recording.workers import NICENESS, pool_of, spare_workers

CPU = torch.device("cpu")


def test_each_thread_of_the_pool_uses_one_core_and_other_threads_keep_theirs():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pool_of(2) as pool:
            assert {pool.submit(torch.get_num_threads).result() for _ in range(8)} == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_thread_keeps_its_number_if_another_one_started_a_pool_before_it(monkeypatch):
    """What the last of them restores is the default that the first one found."""
    is_inside, leave, kept = threading.Event(), threading.Event(), []

    def first() -> None:
        torch.set_num_threads(3)
        with workers._numbers_restored():
            is_inside.set()
            assert leave.wait(100)
        kept.append(torch.get_num_threads())

    def leave_first(refusals) -> None:  # a thread of the second pool
        leave.set()
        other.join()

    before, other = torch.get_num_threads(), threading.Thread(target=first)
    monkeypatch.setattr(workers, "_give_way", leave_first)
    try:
        other.start()
        assert is_inside.wait(100)
        torch.set_num_threads(2)
        pool_of(1).shutdown()
        assert (torch.get_num_threads(), kept) == (2, [3])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
def test_threads_of_the_pool_have_lower_priority_than_training():
    mine = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    with pool_of(2) as pool:
        of_worker = pool.submit(
            lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        ).result()
    assert of_worker == NICENESS > mine
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == mine


def test_cores_that_train_solve_nothing(monkeypatch):
    """With a GPU there is always at least one thread, which uses the core time that training
    leaves."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    assert spare_workers(CPU) == 0
    assert spare_workers(torch.device("cuda")) == 15
    assert spare_workers(torch.device("cuda"), n_processes=2) == 7
    assert spare_workers(torch.device("cuda"), n_processes=16) == 1


def test_solving_threads_take_at_most_a_quarter_of_the_memory(monkeypatch):
    """Each holds one copied eigenproblem and three times as much while solving it."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.setattr("nerve.recording.workers.memory", lambda: 64 * 2**30)
    for gib, n_workers in ((0.25, 15), (0.5, 8), (1, 4), (9, 1)):
        assert spare_workers(torch.device("cuda"), n_bytes=int(gib * 2**30)) == n_workers
    monkeypatch.setenv(SHARE, "4")  # of four trials
    assert spare_workers(torch.device("cuda"), n_bytes=2**28) == 4


def test_a_trial_solves_on_its_share_of_the_cores(monkeypatch):
    for share, n_workers in (("8", 9), ("2", 3), ("1", 2)):
        monkeypatch.setenv(SHARE, share)
        assert spare_workers(torch.device("cuda")) == n_workers
        assert spare_workers(CPU) == 0


def in_time(call):
    """The result of `call`, or what it raises; fails if it does not return."""
    ended: list = []

    def work() -> None:
        try:
            ended.append(call())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(5)
    assert ended, "it waits for ever"
    return ended[0]


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.ESRCH])
def test_threads_that_cannot_lower_their_priority_still_work(monkeypatch, caplog, code):
    def refuse(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("os.setpriority", refuse)
    with in_time(lambda: pool_of(3)) as pool:
        assert [pool.submit(abs, n).result() for n in range(6)] == list(range(6))
    assert caplog.text.count("priority") == 1


def test_a_thread_that_fails_to_start_raises_without_a_wait(monkeypatch):
    set_num_threads = torch.set_num_threads

    def refuse(n):
        if threading.current_thread().name.startswith("spectra"):
            raise RuntimeError("no")
        set_num_threads(n)

    monkeypatch.setattr("torch.set_num_threads", refuse)
    assert isinstance(in_time(lambda: pool_of(2)), MeasurementError)


def test_threads_that_cannot_be_created_raise_without_a_wait(monkeypatch):
    start, started = threading.Thread.start, []

    def refuse(thread):
        if thread.name.startswith("spectra"):
            started.append(thread)
            if len(started) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert isinstance(in_time(lambda: pool_of(3)), MeasurementError)
    started[0].join(5)
    assert not started[0].is_alive()
