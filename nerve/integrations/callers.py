"""Whose pass of a model it is that the Trainer of transformers has called."""

import sys
from collections.abc import Iterator


def is_of_training() -> bool:
    """Whether training calls the model, not a callback that looks at it."""
    called = ("training_step", "call_event")
    return next((name for name in _callers() if name in called), None) != "call_event"


def is_of_evaluation() -> bool:
    """Whether a batch of an evaluation does: neither a callback, nor metrics that are computed
    afterwards, nor what generates text for them, nor a prediction."""
    callers = _callers()
    called = ("generate", "prediction_step", "call_event")
    if next((name for name in callers if name in called), None) != "prediction_step":
        return False
    return next((name for name in callers if name in ("evaluate", "predict")), None) != "predict"


def _callers() -> Iterator[str]:
    """The functions that have called, from the nearest on: the Trainer tells nobody what a pass is
    for, and its own methods keep their names in classes that are made from it."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame.f_code.co_name
