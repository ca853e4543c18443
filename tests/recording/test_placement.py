"""The host solves what it can between measurements; the GPU solves the rest."""

import pytest

from nerve.recording.placement import DEVICE_S, FIRST_S, HOST_S, Placement

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


def chosen_for_the_host(clock, slownesses):
    """How many of 12 eigenproblems 15 threads get at measurements of which each leaves them one and
    a half times as long as they need at their usual speed."""
    placement = Placement(15, clock)
    each = HOST_S * WORK
    counts = []
    for slowness in slownesses:
        clock.now += 1.5 * each
        counts.append(placement.choose([WORK] * 12).count("host"))
        for _ in range(counts[-1]):
            placement.solved("host", WORK, slowness * each)
    return counts


def test_one_slow_measurement_moves_nothing_to_the_gpu(clock):
    """Something else kept the cores busy for a while."""
    assert chosen_for_the_host(clock, (1, 1, 1, 5, 1, 1)) == [12] * 6


def test_cores_that_stay_slow_are_found_out(clock):
    chosen = chosen_for_the_host(clock, [1, 1, 1] + [5] * 20)
    assert chosen[:5] == [12] * 5
    assert chosen[5:] == sorted(chosen[5:], reverse=True)
    assert chosen[-1] == 6  # 1.5 · 1.5 · 15 / 5


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
