"""What the Trainer of transformers runs a forward pass for, according to the call stack."""

import sys
from collections.abc import Iterator


def is_of_training() -> bool:
    """Whether the pass belongs to training and was not started by a callback."""
    called = ("training_step", "call_event")
    return next((name for name in _callers() if name in called), None) != "call_event"


def is_of_evaluation() -> bool:
    """Whether the pass is of a batch of an evaluation: not started by a callback, by the
    computation of metrics, by text generation or by `predict`."""
    callers = _callers()
    called = ("generate", "prediction_step", "call_event")
    if next((name for name in callers if name in called), None) != "prediction_step":
        return False
    return next((name for name in callers if name in ("evaluate", "predict")), None) != "predict"


def _callers() -> Iterator[str]:
    """The names of the calling functions, innermost first. The Trainer does not say what a pass is
    for, but subclasses keep the names of its methods."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame.f_code.co_name
