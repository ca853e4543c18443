"""What the Trainer of transformers runs a forward pass for, according to the call stack and to
the model's adapters."""

import sys
from collections.abc import Iterable, Iterator

from torch import nn


def is_of_training() -> bool:
    """Whether the pass belongs to training and was not started by a callback."""
    called = ("training_step", "call_event")
    return next((name for name in _callers() if name in called), None) != "call_event"


def is_of_evaluation() -> bool:
    """Whether the pass is of a batch of the Trainer's own evaluation: not started by a callback, by
    the computation of metrics, by text generation or by `predict`."""
    callers = tuple(_callers())
    called = ("generate", "prediction_step", "call_event")
    if next((name for name in callers if name in called), None) != "prediction_step":
        return False
    if next((name for name in callers if name in ("evaluate", "predict")), None) == "predict":
        return False
    return _is_of_trainer(callers)


def adapters_of(model: nn.Module) -> list[tuple[bool, str]]:
    """For each module with adapters of PEFT, whether they are off, and which ones are active.

    Trainers for preferences compute their reference with the model itself, with its adapters off or
    with others.
    """
    return [
        (bool(module._disable_adapters), str(getattr(module, "_active_adapter", None)))
        for module in model.modules()
        if hasattr(module, "_disable_adapters")
    ]


def ends_evaluation_of_trainer() -> bool:
    """Whether the evaluation that has ended was not started by a callback."""
    callers = _callers()
    return "evaluate" not in callers or _is_of_trainer(callers)


def _is_of_trainer(callers: Iterable[str]) -> bool:
    called = ("call_event", "_evaluate", "_maybe_log_save_evaluate", "_inner_training_loop")
    return next((name for name in callers if name in called), None) != "call_event"


def _callers() -> Iterator[str]:
    """The names of the calling functions, innermost first. The Trainer does not say what a pass is
    for, but subclasses keep the names of its methods."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        yield frame.f_code.co_name
