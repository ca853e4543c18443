"""The time of blocks of work: each counts once, on the CPU and on a GPU."""

import time
from contextlib import suppress
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from nerve.measuring import clock as module
from nerve.measuring.clock import UNTIMED, Clock

CPU = torch.device("cpu")


@pytest.fixture
def spend(monkeypatch):
    """Lets time pass for the clock."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(seconds):
        now[0] += seconds

    return spend


def test_a_block_within_another_counts_once(spend):
    clock = Clock(CPU)
    with clock:
        spend(1)
        with clock:
            spend(10)
    spend(100)
    clock.start()
    spend(1000)
    clock.stop()
    assert clock.seconds == 1011


def test_a_block_that_raises_ends(spend):
    clock = Clock(CPU)
    with suppress(KeyError), clock:
        spend(1)
        raise KeyError
    spend(10)
    with clock:
        spend(100)
    assert clock.seconds == 101


def test_a_function_is_the_same_with_the_time_of_its_calls(spend):
    def look(a, b):
        spend(a)
        return a + b

    clock = Clock(CPU)
    assert (clock.around(look)(1, 2), clock.seconds) == (3, 1)
    assert UNTIMED.around(look)(1, 2) == 3


def test_compiled_code_has_no_time_and_no_graph_break():
    clock = Clock(CPU)
    double = torch.compile(clock.around(lambda x: 2 * x), backend="eager", fullgraph=True)
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert clock.seconds == 0


class Event:
    """As a GPU's: recorded at once, passed only when the work before it is done."""

    recorded: ClassVar[list["Event"]] = []
    n_waits = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        assert stream == "stream of cuda:1"
        self.has_passed, self.at_ms = False, 0.0
        self.recorded.append(self)

    def query(self):
        return self.has_passed

    def synchronize(self):
        Event.n_waits += 1
        for place, each in enumerate(self.recorded):
            each.has_passed, each.at_ms = True, 1000.0 * 2**place

    def elapsed_time(self, other):
        assert self.has_passed
        assert other.has_passed
        return other.at_ms - self.at_ms


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(Event, "recorded", [])
    monkeypatch.setattr(Event, "n_waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Clock(torch.device("cuda:1"))


def test_a_block_whose_end_passes_before_its_beginning_is_read_later(on_gpu):
    """They may be in two streams; the time between events that have not both passed is an error."""
    with on_gpu:
        pass
    began, ended = Event.recorded
    ended.has_passed, ended.at_ms = True, 5000.0
    with on_gpu:
        pass
    began.has_passed, began.at_ms = True, 2000.0
    with on_gpu:
        pass
    for event in Event.recorded[2:]:
        event.has_passed = True
    assert (on_gpu.seconds, Event.n_waits) == (3, 0)


def test_on_a_gpu_no_block_waits_and_the_time_has_all_of_them(monkeypatch, on_gpu):
    clock = on_gpu
    for _ in range(2):
        with clock, clock:
            pass
    assert (len(Event.recorded), Event.n_waits) == (4, 0)
    assert clock.seconds == (2 - 1) + (8 - 4)
    assert clock.seconds == 5
    assert Event.n_waits == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with clock:
        pass
    assert (clock.seconds, len(Event.recorded)) == (5, 4)


@pytest.mark.cuda
def test_on_a_gpu_it_is_the_time_of_the_kernels_without_a_wait():
    clock, cycles = Clock(torch.device("cuda")), 200_000_000  # a tenth of a second
    with clock:
        torch.cuda._sleep(1)
    assert clock.seconds < 0.05
    began = time.perf_counter()
    with clock:
        torch.cuda._sleep(cycles)
    torch.cuda._sleep(cycles)  # not within a block
    assert time.perf_counter() - began < 0.05
    assert clock.seconds > 0.05
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    assert clock.seconds == pytest.approx(whole / 2, rel=0.2)


@pytest.mark.cuda
def test_what_a_graph_captures_has_no_time():
    clock, x = Clock(torch.device("cuda")), torch.ones(8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), clock:
        y = x + 1
    graph.replay()
    assert (clock.seconds, y.tolist()) == (0, [2] * 8)
