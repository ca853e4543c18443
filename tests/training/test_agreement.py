"""All processes act at the same step on what a single one notices, without an exchange at every
step."""

import threading
from types import SimpleNamespace

import pytest

from nerve.training import agreement
from nerve.training.agreement import DECIDES_WITHIN_S, MOST_STEPS, Agreement

N = 3


@pytest.fixture
def run(monkeypatch):
    """Three processes, as threads with clocks of their own, that come to the end of so many steps;
    for each process what it heard at each step, and how often it asked.

    Args:
        seconds: what each step takes a process.
        wishes: of a process, from a step on.
    """

    def call(n_steps: int, seconds, wishes: dict[int, tuple[int, int]]):
        me, barrier, told = threading.local(), threading.Barrier(N, timeout=100), {}
        heard, asked = [[] for _ in range(N)], [0] * N

        def gathered(value):
            asked[me.rank] += 1
            told[me.rank] = value
            barrier.wait()
            values = [told[rank] for rank in range(N)]
            barrier.wait()
            return values

        def process(rank: int) -> None:
            me.rank, me.now = rank, 0.0
            ours = Agreement()
            for step in range(n_steps):
                me.now += seconds(rank, step)
                wish, since = wishes.get(rank, (0, 0))
                heard[rank].append(ours.on(wish if step >= since else 0))

        monkeypatch.setattr(agreement, "gathered", gathered)
        monkeypatch.setattr(agreement, "n_processes", lambda: N)
        monkeypatch.setattr(agreement, "time", SimpleNamespace(monotonic=lambda: me.now))
        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(N)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
            assert not thread.is_alive()
        return heard, asked

    return call


@pytest.mark.parametrize("who", range(N))
@pytest.mark.parametrize("since", [0, 1, 7, 50])
@pytest.mark.parametrize("step_s", [0.001, 0.1, 3.0])
def test_a_wish_of_one_is_heard_by_all_at_one_step_soon_after(run, who, since, step_s):
    """At any speed of the steps, which each process measures differently."""

    def seconds(rank, step):
        return step_s * (1 + 0.2 * rank) * (1 + 0.1 * (step % 3))

    heard, _ = run(100, seconds, {who: (2, since)})
    assert heard[0] == heard[1] == heard[2]
    first = heard[0].index(2)
    assert set(heard[0][:first]) <= {0}
    assert since <= first < since + MOST_STEPS
    assert sum(seconds(N - 1, step) for step in range(since, first)) <= DECIDES_WITHIN_S


@pytest.mark.parametrize(("step_s", "most"), [(0.001, 5), (0.1, 12), (2.0, 100)])
def test_fast_steps_go_without_an_exchange(run, step_s, most):
    """Of 100 steps; steps that take a second or more have one exchange each, because a run must
    stop within the step in which it is told to."""
    heard, asked = run(100, lambda rank, step: step_s, {})
    assert {*heard[0]} == {0}
    assert asked[0] == asked[1] == asked[2] <= most
    assert (asked[0] == 100) == (step_s > DECIDES_WITHIN_S)


def test_the_highest_of_several_wishes_is_heard(run):
    heard, _ = run(40, lambda rank, step: 2.0, {0: (1, 3), 2: (2, 5)})
    assert heard[1][2:7] == [0, 1, 1, 2, 2]


def test_one_process_asks_nobody(monkeypatch):
    monkeypatch.setattr(agreement, "gathered", None)
    ours = Agreement()
    assert [ours.on(wish) for wish in (0, 2, 1)] == [0, 2, 1]
