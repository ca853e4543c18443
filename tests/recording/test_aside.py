"""Work beside training reads what training computed and keeps it until then; where trials share
cores, the training thread is at most one step ahead of its GPU."""

import gc
import time
import weakref

import pytest
import torch

from nerve.cores import SHARE
from nerve.recording.aside import Aside, Pace


class Held:
    """An object with weak references."""


def test_on_a_cpu_there_is_no_side_stream_and_nothing_is_held():
    aside, held = Aside(torch.device("cpu")), Held()
    seen = weakref.ref(held)
    with aside.work_on(held):
        total = torch.ones(3).sum()
    del held
    gc.collect()
    assert (float(total), seen()) == (3.0, None)
    aside.close(wait=True)


class Ended:
    """An event of a stream that records whether it was waited for."""

    waited = False

    def synchronize(self) -> None:
        self.waited = True


@pytest.mark.parametrize("wait", [True, False])
def test_pending_work_is_waited_for_unless_other_processes_may_have_exited(wait):
    aside, first, last = Aside(torch.device("cpu")), Ended(), Ended()
    aside._held.extend([(first, Held()), (last, Held())])
    aside.close(wait=wait)
    assert (last.waited, len(aside._held)) == (wait, 0)


@pytest.mark.cuda
def test_memory_read_by_the_side_stream_is_not_reused_before():
    """Training is slow to compute the tensor and the side stream slow to read it, and memory of
    that size is requested at once."""
    device = torch.device("cuda")
    aside = Aside(device)
    for again in (False, True):  # kernels are loaded the first time, which waits for the device
        given = torch.zeros(2**24, device=device)
        torch.cuda._sleep(10**9 if again else 1)
        given.fill_(1)
        with aside.work_on([given]):
            torch.cuda._sleep(10**8)
            total = given.sum()
        del given
        if not again:
            torch.full((2**24,), 7.0, device=device)
            torch.cuda.synchronize()
            aside.let_go()
    others = [torch.full((2**24,), 7.0, device=device) for _ in range(3)]
    aside.let_go()
    assert len(aside._held) == 1
    torch.cuda.synchronize()
    aside.let_go()
    assert not aside._held
    assert (float(total), float(others[0][0])) == (2**24, 7)


def test_no_step_waits_on_a_cpu(monkeypatch):
    monkeypatch.setenv(SHARE, "1")
    monkeypatch.setattr("torch.cuda.Event", None)  # on a machine with a GPU none is asked for, too
    pace = Pace(torch.device("cpu"))
    for _ in range(3):
        pace.end_step()


@pytest.mark.cuda
@pytest.mark.parametrize("shares", [True, False])
def test_a_step_begins_when_the_second_to_last_one_has_ended(monkeypatch, shares):
    """Steps take about 50 ms of the GPU and nothing of the host; the thread sleeps and does not
    spin."""
    monkeypatch.delenv(SHARE, raising=False)
    if shares:
        monkeypatch.setenv(SHARE, "1")
    pace = Pace(torch.device("cuda"))
    began = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    began[0].record()
    torch.cuda._sleep(10**8)
    began[1].record()
    torch.cuda.synchronize()
    step_s = began[0].elapsed_time(began[1]) / 1000
    wall, cpu = time.monotonic(), time.thread_time()
    for _ in range(6):
        torch.cuda._sleep(10**8)
        pace.end_step()
    wall, cpu = time.monotonic() - wall, time.thread_time() - cpu
    if shares:  # whatever else waits for the device sleeps, too
        spent = time.thread_time()
        torch.cuda._sleep(10**9)
        torch.ones((), device="cuda").item()
        assert time.thread_time() - spent < 5 * step_s
    torch.cuda.synchronize()
    if shares:
        assert 4 * step_s < wall < 5.9 * step_s
        assert cpu < wall / 2
    else:
        assert wall < step_s
