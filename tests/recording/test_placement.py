"""The host solves what it can between measurements; the GPU solves the rest."""

import heapq
import statistics

import pytest

from nerve.recording.placement import DEVICE_S, FIRST_S, HOST_S, Placement
from nerve.recording.solver import MOST_PENDING

WORK = 2 * 2048.0**3
"""Of one FFN: half a second or more of a core."""


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_spare_cores_solve_everything(clock):
    placement = Placement(15, clock)
    for _ in range(3):
        assert placement.choose([WORK] * 12) == ["host"] * 12
        for _ in range(12):
            placement.solved("host", WORK, HOST_S * WORK)
        clock.now += 10


def test_one_core_solves_what_it_can_in_time(clock):
    """The GPU solves the rest of the interval's work, so that training does not wait for it."""
    placement = Placement(1, clock)
    each = HOST_S * WORK
    placement.choose([WORK])
    placement.solved("host", WORK, each)
    clock.now += 4.5 * each / 1.5
    assert placement.choose([WORK] * 12) == ["host"] * 4 + ["device"] * 8


def test_pending_work_counts(clock):
    placement = Placement(1, clock)
    each = HOST_S * WORK
    placement.choose([WORK] * 3)
    placement.solved("host", WORK, each)
    clock.now += 4.5 * each / 1.5
    assert placement.choose([WORK] * 12).count("host") == 2


def test_solving_times_are_measured(clock):
    """Threads that compete with nine other trials count as slower."""
    placement = Placement(2, clock)
    for _ in range(40):
        clock.now += 100
        assert placement.choose([WORK]) == ["host"]
        placement.solved("host", WORK, 5 * HOST_S * WORK)
    clock.now += 5 * HOST_S * WORK * 2.3 / 1.5
    assert placement.choose([WORK] * 12).count("host") == 4  # two for each thread


def simulated(clock, slowness, n_measurements=24):
    """Measurements of 12 eigenproblems, each of which takes a thread half the time from one to the
    next, times `slowness(time)`; 15 threads solve.

    Returns:
        how many of each the host gets, and how many measurements are pending then.
    """
    placement, each = Placement(15, clock), HOST_S * WORK
    free, running, ends, found = [0.0] * 15, [], [], []
    for index in range(n_measurements):
        clock.now = 2 * each * index
        for end, seconds in sorted(running):
            if end <= clock.now:
                placement.solved("host", WORK, seconds)
        running = [pair for pair in running if pair[0] > clock.now]
        own = []
        for _ in range(placement.choose([WORK] * 12).count("host")):
            begin = max(heapq.heappop(free), clock.now)
            seconds = each * slowness(begin / each)
            heapq.heappush(free, begin + seconds)
            own.append((begin + seconds, seconds))
        running += own
        ends.append(max((end for end, _ in own), default=0.0))
        found.append((len(own), sum(end > clock.now for end in ends)))
    return found


@pytest.mark.parametrize(("spell", "slowness"), [(2, 4), (2, 8), (3, 6), (4, 6)])
def test_while_something_else_keeps_the_cores_busy_nothing_moves_to_the_gpu(clock, spell, slowness):
    """For a spell, in units of the time that one eigenproblem takes."""
    found = simulated(clock, lambda time: slowness if 6.5 < time < 6.5 + spell else 1)
    assert max(n_pending for _, n_pending in found) > 1  # the host did fall behind
    assert all(n_host == 12 for n_host, _ in found)


@pytest.mark.parametrize("slowness", [3, 5])
def test_cores_that_stay_slow_are_found_out_before_training_waits(clock, slowness):
    found = simulated(clock, lambda time: slowness if time > 6.5 else 1)
    assert max(n_pending for _, n_pending in found) <= MOST_PENDING
    # In the long run the host gets what it can solve.
    assert statistics.mean(n_host for n_host, _ in found[-12:]) <= 2 * 15 / slowness + 1


def test_a_gpu_that_is_slower_than_the_threads_solves_nothing(clock):
    """A GPU whose float64 is 64 times slower than its float32."""
    placement = Placement(4, clock)
    for _ in range(40):
        placement.solved("device", WORK, 20 * DEVICE_S * WORK)
    placement.choose([WORK])
    clock.now += 0.01
    assert placement.choose([WORK] * 12) == ["host"] * 12


def test_without_threads_the_gpu_solves_everything(clock):
    assert Placement(0, clock).choose([WORK] * 3) == ["device"] * 3


def test_the_first_measurement_does_not_keep_the_host_busy_for_long(clock):
    chosen = Placement(1, clock).choose([WORK] * 100)
    assert chosen.count("host") == int(FIRST_S / (HOST_S * WORK))
    assert chosen.count("device") > 0


def test_a_failed_eigenproblem_is_no_longer_pending(clock):
    placement = Placement(1, clock)
    placement.choose([WORK])
    placement.solved("host", WORK, None)
    clock.now += 1.5 * HOST_S * WORK / 1.5
    assert placement.choose([WORK]) == ["host"]
