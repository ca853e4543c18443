"""How often Lightning has updated a module's weights, and what it is asked to do next."""

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from nerve.measuring.ffns import FFN, sites_of
from nerve.optim import Role
from nerve.recording.settings import MeasuredSteps

NEVER = sys.maxsize
"""A validation interval that no training comes to."""


class WeightUpdates:
    """Counts the updates of the weights that a fit trains.

    Lightning counts the steps of all optimizers. With automatic optimization that is the number of
    updates. With manual optimization several optimizers may step for one update, and some may not
    be Lightning's: here, optimizers that each step once in a batch have made one update together.

    Attributes:
        n: updates so far.
    """

    def __init__(self) -> None:
        self.n = 0
        self._steps = MeasuredSteps(None)
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
        """Begins to count, from `n` on where Lightning does not count itself.

        Args:
            steps: those that are to be measured.
            on_step: is called after each step of an optimizer that the module steps itself.
        """
        self._steps = steps
        self._is_manual = not module.automatic_optimization
        if not self._is_manual:
            self.n = trainer.global_step
        self._next = steps.after(self.n)
        if not self._is_manual:
            return
        trained = {id(parameter) for parameter in module.parameters()}

        def count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if any(id(each) in trained for each in _parameters(optimizer)):
                self._stepped[id(optimizer)] += 1
                on_step()

        self._handle = register_optimizer_step_post_hook(count)

    def end_batch(self, trainer: L.Trainer) -> bool:
        """Counts those of the batch that has ended; whether there were any."""
        before = self.n
        if self._is_manual:
            self.n += max(self._stepped.values(), default=0)
            self._stepped.clear()
        else:
            self.n = trainer.global_step
        return self.n > before

    def take_due(self) -> bool:
        """Whether the update that was counted last is to be measured, or one that it came past."""
        is_due = self._next is not None and self.n >= self._next
        if is_due:
            self._next = self._steps.after(self.n)
        return is_due

    def close(self) -> None:
        """Counts no more; allowed at any time."""
        self._stepped.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def last_update(trainer: L.Trainer, module: L.LightningModule) -> int | None:
    """The update that ends the fit; None where that is not known before."""
    if not module.automatic_optimization:
        return None
    try:
        last = trainer.estimated_stepping_batches
    except MisconfigurationException:  # of accumulation that changes from epoch to epoch
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
    """Has Lightning validate after the batch that has just ended, or not before it is asked to.

    Its own interval counts batches, and neither updates nor single steps.
    """
    trainer.val_check_batch = 1 if yes else NEVER


def rate_of(optimizers: Sequence[Optimizer], ffns: Sequence[FFN]) -> float | None:
    """The learning rate of the measured weights, as the schedule left it: that of the optimizers
    that hold them, None where it is not one. Of shards, which no optimizer has by that name, that
    of all optimizers."""
    measured = {
        id(weight) for ffn in ffns for site in sites_of(ffn) for weight in site.module.parameters()
    }
    holding = [o for o in optimizers if any(id(each) in measured for each in _parameters(o))]
    rates = {hidden_lr(optimizer) for optimizer in holding or optimizers}
    return rates.pop() if len(rates) == 1 else None


def hidden_lr(optimizer: Optimizer) -> float | None:
    """The present learning rate of the hidden weights, as the schedule left it.

    That of the parameter groups with the role `hidden`; in an optimizer that `build_optimizer` did
    not make, where groups have no roles, that of all groups. None where they have several.
    """
    groups = optimizer.param_groups
    hidden = [group for group in groups if group.get("role") == Role.HIDDEN]
    rates = {float(group["lr"]) for group in hidden or groups}
    return rates.pop() if len(rates) == 1 else None


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [each for group in optimizer.param_groups for each in group["params"]]
