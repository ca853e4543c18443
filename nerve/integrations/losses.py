"""Losses of the forward passes of one update, for models that compute their own loss."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nerve.integrations.callers import is_of_training
from nerve.integrations.features import untraced
from nerve.measuring.processes import n_processes
from nerve.recording.cadence import loss_of
from nerve.recording.recorder import Recorder


@dataclass
class _Pass:
    """A training pass: its mean loss, its number of targets as the model gives it, that of the
    whole update as the Trainer gives it, and whether a backward pass went through the loss."""

    loss: Tensor
    n_targets: int | None
    items: Any
    is_trained: bool = False

    def note_backward(self, gradient: Tensor) -> None:
        self.is_trained = True


class StepLosses:
    """Keeps the losses of a model's training passes until their update is made.

    Only losses that a backward pass goes through are training losses: some trainers, such as those
    for preferences, compute their own from the model's outputs.

    A model that accepts `num_items_in_batch` has divided each micro-batch's sum by the number of
    targets of the whole update, so the sum of its losses is the mean. For other models, each
    micro-batch's loss is a mean of its own.

    Args:
        model: the module that the Trainer trains.
        of_all: whether that number covers all processes.
    """

    def __init__(self, model: nn.Module, *, of_all: bool) -> None:
        self._of_all = of_all and n_processes() > 1
        self._passes: list[_Pass] = []
        self._model = weakref.ref(model)
        self._handle = model.register_forward_hook(untraced(self._keep), with_kwargs=True)

    def give(self, recorder: Recorder) -> None:
        """Adds the losses of the completed update."""
        trained = [each for each in self._passes if each.is_trained]
        shares = [each for each in trained if each.items is not None]
        if shares:
            mean = torch.stack([each.loss for each in shares]).sum()
            scale = n_processes() if self._of_all else 1
            recorder.add_training(mean * scale, int(shares[0].items), of_all=self._of_all)
        for each in trained:
            if each.items is None:
                recorder.add_training(each.loss, each.n_targets)
        self._passes.clear()

    def close(self) -> None:
        """Removes the hooks from the model."""
        self._handle.remove()

    def _keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        is_own = module is self._model()  # a replica shares its hooks
        is_meant = is_own and module.training and torch.is_grad_enabled()
        if not (is_meant and is_of_training()):
            return
        found = loss_of(output)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is not None and isinstance(loss, Tensor) and loss.requires_grad:
            # A copy: the Trainer scales the loss in place.
            made = _Pass(found[0].clone(), found[1], kwargs.get("num_items_in_batch"))
            loss.register_hook(made.note_backward)
            self._passes.append(made)
