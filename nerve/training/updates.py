"""Counts how often Lightning has updated a module's weights, and decides when it validates."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from nerve.recording.cadence import parameters_of
from nerve.recording.settings import MeasuredSteps

NEVER = sys.maxsize
"""A validation interval that no training reaches."""


class WeightUpdates:
    """Counts the weight updates of a fit.

    Lightning counts the steps of all optimizers. With automatic optimization this is the number of
    updates. With manual optimization, one update may consist of the steps of several optimizers,
    not all of which belong to Lightning: here, optimizers that each step once in a batch count as
    one update.

    Attributes:
        n: updates so far.
        steps: those to measure.
    """

    def __init__(self) -> None:
        self.n = 0
        self.steps = MeasuredSteps(None)
        self._next: int | None = None
        self._is_manual = False
        self._stepped: Counter[int] = Counter()
        self._handle: RemovableHandle | None = None

    def open(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        steps: MeasuredSteps,
        on_step: Callable[[], None],
    ) -> None:
        """Starts counting: from Lightning's count, or with manual optimization from `n`.

        Args:
            steps: the steps to measure.
            on_step: called after each optimizer step that the module takes itself.
        """
        self.steps = steps
        self._is_manual = not module.automatic_optimization
        if not self._is_manual:
            self.n = trainer.global_step
        self._next = steps.after(self.n)
        if not self._is_manual:
            return
        trained = {id(parameter) for parameter in module.parameters()}

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if any(id(each) in trained for each in parameters_of(optimizer)):
                self._stepped[id(optimizer)] += 1
                on_step()

        self._handle = register_optimizer_step_post_hook(count)

    def end_batch(self, trainer: L.Trainer) -> bool:
        """Counts the updates of the batch that has ended; returns whether there were any."""
        before = self.n
        if self._is_manual:
            self.n += max(self._stepped.values(), default=0)
            self._stepped.clear()
        else:
            self.n = trainer.global_step
        return self.n > before

    def take_due(self) -> bool:
        """Whether a step to be measured has been reached or passed since the last call."""
        is_due = self._next is not None and self.n >= self._next
        if is_due:
            self._next = self.steps.after(self.n)
        return is_due

    def close(self) -> None:
        """Stops counting; may be called at any time."""
        self._stepped.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def last_update(trainer: L.Trainer, module: L.LightningModule) -> int | None:
    """The update that ends the fit; None if it is not known in advance."""
    if not module.automatic_optimization:
        return None
    try:
        last = trainer.estimated_stepping_batches
    except MisconfigurationException:  # the accumulation changes from epoch to epoch
        last = trainer.max_steps
    return int(last) if math.isfinite(last) and last >= 0 else None


def is_last_batch(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the batch that has ended is the last one of the fit."""
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return True
    ends_epoch = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
    max_epochs = trainer.max_epochs
    return ends_epoch and max_epochs not in (None, -1) and trainer.current_epoch + 1 >= max_epochs


def validate_next(trainer: L.Trainer, yes: bool) -> None:
    """Makes Lightning validate after the batch that has just ended, or not until asked to.

    Lightning's own interval counts batches, not updates or individual steps.
    """
    trainer.val_check_batch = 1 if yes else NEVER
