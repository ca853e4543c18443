"""The features of a training step that somebody else's loop runs."""

from typing import Any

import torch
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.choice import Choice
from nerve.recording.recorder import Recorder


class TrainingFeatures:
    """Takes the features of each training pass of a model while a step is due.

    A training pass is a call in train mode with gradients; each of a step's micro-batches is one.
    It ends where the model returns: activation checkpointing runs parts of it again in the backward
    pass, which do not count.

    Args:
        model: the module that is called.
        recorder: open; says when a step is due, and takes the features.
        choice: which samples of a batch count.
    """

    def __init__(self, model: nn.Module, recorder: Recorder, choice: Choice) -> None:
        self._recorder = recorder
        self._choice = choice
        self._n_seen = 0
        self._is_taking = False
        self._handles = [
            model.register_forward_pre_hook(self._start, with_kwargs=True),
            model.register_forward_hook(self._stop),
        ]

    def require_seen(self, step: int) -> None:
        """Raises `MeasurementError` where no training pass has come since this was last called."""
        if self._n_seen == 0:
            raise MeasurementError(
                f"The features of step {step} are those of the training pass that follows it, and "
                "none was seen: the module that is watched must be the one that the loop calls, in "
                "train mode and with gradients. Watch the compiled or distributed one if the loop "
                "calls that, or give held-out batches with heldout=."
            )
        self._n_seen = 0

    def close(self) -> None:
        """Lets the model alone."""
        for handle in self._handles:
            handle.remove()

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recorder.is_due and module.training and torch.is_grad_enabled():
            self._is_taking = True
            self._recorder.start(*self._choice.of(_batch(args, kwargs)))

    def _stop(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._is_taking:
            self._is_taking = False
            self._recorder.stop()
            self._n_seen += 1


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a model is called with, as the batch that it is."""
    if not args:
        return kwargs
    return args[0] if len(args) == 1 and not kwargs else args
