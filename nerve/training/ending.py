"""How training ended where nothing was raised: at its last step, by a rule on results, or early."""

import math

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from nerve.errors import MeasurementError
from nerve.training.fit import callbacks_of
from nerve.training.signals import Interrupted


def take_timers(trainer: L.Trainer) -> float:
    """Takes Lightning's timers (`trainer.max_time`) out of the trainer; the seconds that the first
    of them allows, infinite without any.

    A timer ends training as if it were done, and once it has, it ends every resumed run at once. A
    run keeps the time itself, anew at each start, and saves where the time is over.
    """
    callbacks = callbacks_of(trainer)
    timers = [each for each in callbacks if isinstance(each, Timer)]
    others = [each for each in callbacks if each not in timers]
    trainer.callbacks = others  # type: ignore[attr-defined]  # which it may be going through
    allowed = [timer.time_remaining() for timer in timers]
    return min((seconds for seconds in allowed if seconds is not None), default=math.inf)


def follows_a_rule(trainer: L.Trainer) -> bool:
    """Whether a callback has ended training by its results."""
    return bool(_rules(trainer))


def stopped_by(trainer: L.Trainer) -> str | None:
    """The rule on results that has ended training before its last step; None at the last step.

    Raises:
        Interrupted: where something else has.
    """
    step, last = trainer.global_step, trainer.max_steps
    if step >= last:
        return None
    rules = _rules(trainer)
    if not trainer.should_stop or not rules:
        raise Interrupted(
            f"Training ended at step {step:,} of {last:,}, and nothing says that it is done. "
            "A callback that ends a run by its results is an EarlyStopping; other limits than "
            "trainer.max_steps and trainer.max_time do not end a run."
        )
    reasons = (getattr(rule, "stopping_reason_message", None) for rule in rules)
    names = " or ".join(f"{type(rule).__name__}({rule.monitor})" for rule in rules)
    return next(filter(None, reasons), names)


def require_validated(n_targets: int, n_heldout: int) -> None:
    """Raises `MeasurementError` unless the whole held-out set was validated, and so measured; a
    process that has validated nothing (`n_targets` 0) goes on with what was."""
    if n_targets not in (0, n_heldout):
        raise MeasurementError(
            f"A run validates and measures its whole held-out set, {n_heldout:,} targets; the last "
            f"validation saw {n_targets:,}. Something limits its batches: leave it out, and set "
            "monitor.n_tokens (images: data.n_heldout)."
        )


def _rules(trainer: L.Trainer) -> list[EarlyStopping]:
    """Those that have ended training: all, where Lightning (before 2.6) keeps no reason."""
    rules = [each for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)]
    return [rule for rule in rules if getattr(rule, "stopping_reason_message", "") is not None]
