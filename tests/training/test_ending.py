"""Whether a run is done depends on what was done, not on the absence of an error."""

import math
from datetime import timedelta
from types import SimpleNamespace

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping, Timer

from nerve.errors import MeasurementError
from nerve.training.ending import follows_a_rule, require_validated, stopped_by, take_timers
from nerve.training.signals import Interrupted


def trainer(step: int = 10, *callbacks: L.Callback, should_stop: bool = True) -> SimpleNamespace:
    return SimpleNamespace(
        global_step=step, max_steps=10, should_stop=should_stop, callbacks=list(callbacks)
    )


def test_at_its_last_step_training_is_done_whoever_asked_it_to_stop():
    assert stopped_by(trainer(10, EarlyStopping("val_loss"))) is None
    assert stopped_by(trainer(10, should_stop=False)) is None


def test_a_rule_on_results_is_named():
    rule, other = EarlyStopping("val_loss"), EarlyStopping("train_loss")
    rule.stopping_reason_message = "val_loss did not improve in the last 3 records."
    assert stopped_by(trainer(7, other, rule)) == "val_loss did not improve in the last 3 records."


def test_a_rule_of_a_lightning_that_keeps_no_reason_is_named():
    rule = EarlyStopping("val_loss")
    vars(rule).pop("stopping_reason_message", None)
    assert stopped_by(trainer(7, rule)) == "EarlyStopping(val_loss)"


def test_a_rule_that_has_not_decided_answers_for_nobody():
    """Something else has asked to stop."""
    rule = EarlyStopping("val_loss")
    rule.stopping_reason_message = None  # as it begins, where Lightning keeps reasons
    assert not follows_a_rule(trainer(7, rule))
    with pytest.raises(Interrupted, match="something else ended training"):
        stopped_by(trainer(7, rule))


@pytest.mark.parametrize("callbacks", [(), (L.Callback(),), (EarlyStopping("val_loss"),)])
def test_anything_else_that_ends_early_has_interrupted_the_run(callbacks):
    """A user's callback, or fewer batches than steps; also if early stopping did not ask to
    stop."""
    with pytest.raises(
        Interrupted, match="something else ended training at step 7 of 10"
    ) as stopped:
        stopped_by(trainer(7, *callbacks, should_stop=not any(callbacks)))
    assert stopped.value.code == 75


def test_timers_are_taken_out_and_the_shortest_counts():
    rule = EarlyStopping("val_loss")
    hour, minute = Timer(timedelta(hours=1)), Timer({"minutes": 1})
    holder = trainer(0, hour, rule, minute)
    assert take_timers(holder) == 60
    assert holder.callbacks == [rule]
    assert take_timers(holder) == math.inf
    assert take_timers(trainer(0, Timer(None))) == math.inf


def test_a_validation_of_a_part_is_refused():
    require_validated(1024, 1024)
    require_validated(0, 1024)  # a run that was gone on with at its end
    with pytest.raises(MeasurementError, match=r"1,024 targets; the last validation saw 128\."):
        require_validated(128, 1024)
