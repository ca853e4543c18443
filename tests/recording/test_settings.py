"""Which steps are measured: a cadence, single steps, a spacing, and their union."""

from itertools import pairwise

import pytest

from nerve.errors import ConfigError
from nerve.recording.settings import MeasuredSteps, MonitorSettings, steps_of


@pytest.mark.parametrize("every", [None, 1, 3, 7])
@pytest.mark.parametrize("single", [(), (0,), (2, 5, 6, 21)])
def test_the_next_step_is_the_first_measured_one(every, single):
    """Compared with the set of all measured steps."""
    steps = MeasuredSteps(every, single)
    cadence = set(range(0, 100, every)) if every else set()
    expected = sorted(cadence | set(single))
    assert [step for step in range(50) if step in steps] == [s for s in expected if s < 50]
    for step in range(30):
        later = [each for each in expected if each > step]
        assert steps.after(step) == (later[0] if later else None)


@pytest.mark.parametrize(("n", "last"), [(2, 1), (2, 9), (4, 8), (30, 1000), (30, 20), (5, 10**6)])
def test_a_spacing_is_geometric_from_step_1_to_the_last(n, last):
    steps = steps_of(f"log:{n}", last)
    assert steps[:2] == (0, 1)
    assert steps[-1] == last
    assert len(steps) <= n + 1
    assert list(steps) == sorted(set(steps))
    factor = last ** (1 / (n - 1))
    for one, other in pairwise(steps[1:]):
        assert other - one == 1 or abs(other - one * factor) <= 0.5 * (1 + factor)


def test_a_list_is_sorted_without_duplicates():
    assert steps_of([8, 0, 2, 2], None) == (0, 2, 8)
    assert steps_of(None, 5) == ()
    with pytest.raises(ConfigError, match="log:3 needs the last step"):
        steps_of("log:3", None)


def test_a_cadence_of_groups_needs_no_groups_as_a_sweep_may_cross_them_and_stored_runs_have_it():
    for parts in ({}, {"groups": ["halves"]}, {"sites": ["input"]}):
        assert MonitorSettings(groups_every=4, **parts).groups_every == 4


@pytest.mark.parametrize(
    ("every", "steps", "begins"),
    [(5, None, True), (None, [0, 3], True), (None, [3], False), (None, "log:4", True)],
)
def test_step_0_is_measured_if_requested(every, steps, begins):
    settings = MonitorSettings(every_n_steps=every, steps=steps)
    assert settings.begins_at_zero == begins == (0 in settings.measured_steps(10))
