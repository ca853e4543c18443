"""The losses of the passes of one update, where the model computes them."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from nerve.integrations.features import untraced
from nerve.measuring.distributed import n_processes
from nerve.recording.cadence import loss_of
from nerve.recording.recorder import Recorder


class StepLosses:
    """Keeps the losses of a model's training passes until the update that they are for is made.

    A model that takes `num_items_in_batch` has divided each micro-batch's sum by the number of
    targets of the whole update: the sum of what it returns is the mean. Of another one each
    micro-batch's loss is a mean of its own.

    Args:
        model: the module that the Trainer trains.
        of_all: whether that number is of all processes.
    """

    def __init__(self, model: nn.Module, *, of_all: bool) -> None:
        self._of_all = of_all and n_processes() > 1
        self._passes: list[tuple[Tensor, int | None, Any]] = []
        self._model = weakref.ref(model)
        self._handle = model.register_forward_hook(untraced(self._keep), with_kwargs=True)

    def give(self, recorder: Recorder) -> None:
        """Counts those of the update that was made."""
        shares = [(loss, items) for loss, _, items in self._passes if items is not None]
        if shares:
            mean = torch.stack([loss for loss, _ in shares]).sum()
            scale = n_processes() if self._of_all else 1
            recorder.add_training(mean * scale, int(shares[0][1]), of_all=self._of_all)
        for loss, n_targets, items in self._passes:
            if items is None:
                recorder.add_training(loss, n_targets)
        self._passes.clear()

    def close(self) -> None:
        """Lets the model alone."""
        self._handle.remove()

    def _keep(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        is_own = module is self._model()  # a copy has its hooks, too
        if not (is_own and module.training and torch.is_grad_enabled()):
            return
        found = loss_of(output)
        if found is not None:
            # A copy: the Trainer scales the loss in its place.
            self._passes.append((found[0].clone(), found[1], kwargs.get("num_items_in_batch")))
