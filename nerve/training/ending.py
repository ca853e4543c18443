"""How training ended if nothing was raised: at the last step, by early stopping, or too soon."""

import math

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer

from nerve.errors import MeasurementError
from nerve.training.fit import callbacks_of
from nerve.training.signals import Interrupted


def take_timers(trainer: L.Trainer) -> float:
    """Removes Lightning's timers (`trainer.max_time`) from the trainer and returns the shortest
    time that they allow, in seconds; infinity if there are none.

    A timer ends training as if it were complete, and then ends every resumed run immediately. A run
    therefore keeps the time itself, starting over at each start, and saves when the time is up.
    """
    callbacks = callbacks_of(trainer)
    timers = [each for each in callbacks if isinstance(each, Timer)]
    others = [each for each in callbacks if each not in timers]
    trainer.callbacks = others  # type: ignore[attr-defined]  # may be iterating over the old list
    allowed = [timer.time_remaining() for timer in timers]
    return min((seconds for seconds in allowed if seconds is not None), default=math.inf)


def follows_a_rule(trainer: L.Trainer) -> bool:
    """Whether a callback has ended training because of its results."""
    return bool(_rules(trainer))


def stopped_by(trainer: L.Trainer) -> str | None:
    """What early stopping says about ending training before its last step; None at the last step.

    Raises:
        Interrupted: if something else ended training before its last step.
    """
    step, last = trainer.global_step, trainer.max_steps
    if step >= last:
        return None
    reason = early_stopping(trainer)
    if reason is None:
        raise Interrupted(
            f"A run is done at trainer.max_steps or when an EarlyStopping callback stops it; "
            f"something else ended training at step {step:,} of {last:,}. Use EarlyStopping, "
            "trainer.max_steps or trainer.max_time to end a run."
        )
    return reason


def early_stopping(trainer: L.Trainer) -> str | None:
    """What the `EarlyStopping` callbacks that have ended training say; None if none has."""
    rules = _rules(trainer)
    if not trainer.should_stop or not rules:
        return None
    reasons = (getattr(rule, "stopping_reason_message", None) for rule in rules)
    names = " or ".join(f"{type(rule).__name__}({rule.monitor})" for rule in rules)
    return next(filter(None, reasons), names)


def require_validated(n_targets: int, n_heldout: int) -> None:
    """Raises `MeasurementError` unless the whole held-out set was validated, and so measured. A
    process that has not validated anything yet (`n_targets` 0) passes."""
    if n_targets not in (0, n_heldout):
        raise MeasurementError(
            f"A run validates and measures its whole held-out set of {n_heldout:,} targets; the "
            f"last validation saw {n_targets:,}. Remove what limits its batches, and set "
            "monitor.n_tokens (images: data.n_heldout) instead."
        )


def _rules(trainer: L.Trainer) -> list[EarlyStopping]:
    """The `EarlyStopping` callbacks that have ended training; all of them with Lightning before
    2.6, which does not keep the reason."""
    rules = [each for each in callbacks_of(trainer) if isinstance(each, EarlyStopping)]
    return [rule for rule in rules if getattr(rule, "stopping_reason_message", "") is not None]
