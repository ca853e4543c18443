"""Multipliers in closed form, their limits, and how a scheduler applies them."""

import math

import pytest
import torch

from nerve.errors import ConfigError
from nerve.optim import Schedule


def multipliers(schedule, n_steps):
    return [schedule.multiplier(step, n_steps) for step in range(n_steps)]


def test_warmup_rises_linearly_to_one_at_its_last_step():
    schedule = Schedule("linear", warmup=0.4)
    assert multipliers(schedule, 10)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_whole_numbers_are_numbers():
    assert Schedule("polynomial", warmup=0, final=1, power=2) == Schedule(
        "polynomial", warmup=0.0, final=1.0, power=2.0
    )


def test_without_warmup_the_first_update_has_the_full_rate():
    assert Schedule("cosine").multiplier(0, 7) == 1.0


def test_linear_in_closed_form():
    """Five steps without warm-up: 1 - s/5; `final` would only be reached at a sixth step."""
    schedule = Schedule("linear")
    assert multipliers(schedule, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2], abs=1e-15)
    assert schedule.multiplier(5, 5) == 0.0


def test_cosine_in_closed_form():
    """Two warm-up steps of six, then final + (1 - final)(1 + cos πt)/2 at t = 0, 1/4, 1/2, 3/4."""
    root = math.sqrt(0.5)
    expected = [0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + root), 0.55, 0.1 + 0.45 * (1 - root)]
    schedule = Schedule("cosine", warmup=1 / 3, final=0.1)
    assert multipliers(schedule, 6) == pytest.approx(expected, abs=1e-15)


def test_polynomial_in_closed_form():
    schedule = Schedule("polynomial", final=0.2, power=2.0)
    expected = [0.2 + 0.8 * (1 - s / 4) ** 2 for s in range(4)]
    assert multipliers(schedule, 4) == pytest.approx(expected, abs=1e-15)


def test_polynomial_of_power_one_is_linear():
    linear = Schedule("linear", warmup=0.1, final=0.3)
    polynomial = Schedule("polynomial", warmup=0.1, final=0.3, power=1.0)
    assert multipliers(polynomial, 30) == multipliers(linear, 30)


def test_constant_holds_one_until_its_cooldown():
    schedule = Schedule("constant", warmup=0.2, cooldown=0.4)
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert multipliers(schedule, 10) == pytest.approx(expected, abs=1e-15)


def test_a_cooldown_that_rounds_into_the_warmup_begins_after_it():
    """Halves of three steps both round to two; the warm-up takes precedence."""
    assert multipliers(Schedule("constant", warmup=0.5, cooldown=0.5), 3) == [0.5, 1.0, 1.0]


def test_constant_without_cooldown_stays_at_one():
    assert set(multipliers(Schedule("constant", cooldown=0.0), 9)) == {1.0}


SCHEDULES = [
    Schedule("cosine", warmup=0.05, final=0.1),
    Schedule("linear", warmup=0.5, final=0.25),
    Schedule("polynomial", warmup=0.1, final=0.0, power=3.0),
    Schedule("constant", warmup=0.3, final=0.2, cooldown=0.7),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("n_steps", [1, 2, 3, 7, 400])
def test_range_and_shape_whatever_the_number_of_steps(schedule, n_steps):
    """Rises, then falls, within (0, 1]: no update has a rate of zero; after the end it is
    `final`."""
    values = multipliers(schedule, n_steps)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert min(values) > 0.0
    assert max(values) == 1.0
    assert schedule.multiplier(n_steps, n_steps) == schedule.multiplier(9999, n_steps)
    assert schedule.multiplier(n_steps, n_steps) == schedule.final


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_last_update_is_one_step_above_final(schedule):
    """The last decrease is the decay at t = 1 - 1/n_decay, which shrinks with the run's length."""
    n_steps = 100_000
    assert schedule.multiplier(n_steps - 1, n_steps) == pytest.approx(schedule.final, abs=2e-4)


def test_scheduler_sets_the_rate_of_the_update_before_it_runs():
    """Update s runs at base · multiplier(s), in every group with its own base learning rate."""
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [{"params": [weights[0]], "lr": 2.0}, {"params": [weights[1]], "lr": 0.5}]
    )
    schedule = Schedule("cosine", warmup=0.25, final=0.1)
    scheduler = schedule.scheduler(optimizer, n_steps=8)
    for step in range(8):
        rates = [group["lr"] for group in optimizer.param_groups]
        multiplier = schedule.multiplier(step, 8)
        assert rates == [2.0 * multiplier, 0.5 * multiplier]
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2, abs=1e-15)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "cosin"}, "Did you mean 'cosine'"),
        ({"name": "cosine", "warmup": 1.0}, r"schedule\.warmup must be a number in \[0, 1\)"),
        ({"name": "cosine", "warmup": -0.1}, "warmup"),
        ({"name": "cosine", "warmup": math.nan}, "warmup"),
        ({"name": "cosine", "warmup": True}, "got True"),
        ({"name": "cosine", "final": 1.5}, r"schedule\.final must be a number in \[0, 1\]"),
        ({"name": "polynomial"}, r"needs optimizer\.schedule\.power"),
        ({"name": "polynomial", "power": 0.0}, "finite and above 0"),
        ({"name": "polynomial", "power": math.inf}, "finite and above 0"),
        ({"name": "cosine", "power": 2.0}, "power only applies to name=polynomial"),
        ({"name": "constant"}, r"needs optimizer\.schedule\.cooldown"),
        ({"name": "linear", "cooldown": 0.2}, "cooldown only applies to name=constant"),
        ({"name": "constant", "warmup": 0.5, "cooldown": 0.6}, r"schedule\.warmup=0\.5"),
    ],
)
def test_bad_values_are_refused_with_their_key(values, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**values)


@pytest.mark.parametrize(("step", "n_steps"), [(-1, 10), (0, 0)])
def test_impossible_steps_are_refused(step, n_steps):
    with pytest.raises(ConfigError, match="step"):
        Schedule("cosine").multiplier(step, n_steps)
