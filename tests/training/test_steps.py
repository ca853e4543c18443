"""Features are taken within a step, and the strategy is left as it was."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from nerve.training.steps import STEPS, StepFeatures


class Strategy:
    """Runs steps as Lightning's do, and notes that."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def training_step(self, *args: Any) -> str:
        self.events.append("step")
        if args == ("bad",):
            raise ValueError("the step fails")
        return "output"

    validation_step = training_step


@pytest.fixture
def events() -> list[Any]:
    return []


@pytest.fixture
def strategy(events) -> Strategy:
    return Strategy(events)


@pytest.fixture
def features(events, strategy):
    recorder = SimpleNamespace(
        clock=nullcontext(),
        start=lambda chosen: events.append(chosen),
        stop=lambda: events.append("stop"),
    )
    choice = SimpleNamespace(of=lambda batch: f"samples of {batch}")
    features = StepFeatures(SimpleNamespace(strategy=strategy), recorder, choice)
    yield features
    features.close()


@pytest.mark.parametrize("name", STEPS)
def test_an_expected_step_is_measured_and_no_other(events, strategy, features, name):
    run = getattr(strategy, name)
    assert run("a") == "output"
    features.expect("b")
    assert run("b") == "output"
    features.end()
    run("c")
    features.end()
    assert events == ["step", "samples of b", "step", "stop", "step"]


@pytest.mark.parametrize("batch", ["a", None])
def test_a_step_that_never_ran_is_begun_and_ended_so_that_its_absence_is_seen(
    events, features, batch
):
    features.expect(batch)
    features.end()
    assert events == [f"samples of {batch}", "stop"]


def test_a_step_whose_forward_pass_is_over_is_ended_once(events, strategy, features):
    features.expect("a")
    strategy.training_step = _then(strategy.training_step, features.stop)
    strategy.training_step("a")
    features.stop()
    features.end()
    assert events == ["samples of a", "step", "stop"]


def _then(step, after):
    def run(*args):
        output = step(*args)
        after()
        return output

    return run


@pytest.mark.parametrize("raises", [False, True])
def test_the_strategy_is_left_as_it_was(events, strategy, raises):
    """Also where other code had wrapped one of its methods, and after a step that failed."""
    strategy.training_step = wrapped = _then(strategy.training_step, lambda: None)
    recorder = SimpleNamespace(clock=nullcontext(), start=events.append, stop=lambda: None)
    choice = SimpleNamespace(of=lambda batch: batch)
    features = StepFeatures(SimpleNamespace(strategy=strategy), recorder, choice)
    features.expect("bad")
    if raises:
        with pytest.raises(ValueError, match="the step fails"):
            strategy.training_step("bad")
    for _ in range(2):
        features.close()
        assert strategy.training_step is wrapped
        assert "validation_step" not in vars(strategy)
    strategy.training_step("a")
    assert events == [*(["bad", "step"] if raises else []), "step"]
