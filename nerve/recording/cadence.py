"""What passes between two measurements, and the columns that the rows of one share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nerve.measuring.distributed import add_up, gathered, own_part
from nerve.recording.solver import Labels


class Cadence:
    """Sums losses and tokens up from one measured step to the next, and labels that step.

    A step is labeled when its validation is over: with the validation loss of its weights, and the
    mean training loss since the step that was labeled before. The label waits in `due` until the
    features of that step are measured.
    """

    def __init__(self) -> None:
        self.due: Labels | None = None
        """The labels of the measurement that is to come; None between measurements."""
        self.val_loss: float | None = None
        """The last validation loss, nats per target."""
        self._tokens_seen = 0
        self._training = WeightedMean()
        self._validation = WeightedMean()

    def add_training(self, loss: Tensor, n_targets: int, n_processes: int) -> None:
        """Counts a batch: the mean loss of this process's targets, of which all have as many."""
        self._training.add(loss, n_targets)
        self._tokens_seen += n_targets * n_processes

    def start_validation(self) -> None:
        """Begins the held-out set anew."""
        self._validation = WeightedMean()

    def add_validation(self, loss: Tensor, n_targets: int) -> None:
        """Counts a held-out batch."""
        self._validation.add(loss, n_targets)

    @property
    def n_validated(self) -> int:
        """Targets of the last validation; 0 before the first of this process."""
        return self._validation.weight

    def label(self, step: int, lr: float | None, *, n_processes: int, is_split: bool) -> None:
        """Labels the measurement of `step`; all processes must call it.

        Args:
            step: optimizer steps so far.
            lr: the learning rate of the hidden weights.
            n_processes: how many train.
            is_split: whether each of them evaluated its own part of the held-out set.
        """
        self.val_loss = self._validation.value(over_processes=is_split)
        self.due = {
            "step": step,
            "tokens_seen": self._tokens_seen,
            "train_loss": self._training.value(over_processes=n_processes > 1),
            "val_loss": self.val_loss,
            "lr": lr,
        }
        self._training = WeightedMean()

    def take_due(self) -> Labels | None:
        """The labels that wait, which then wait no more."""
        due, self.due = self.due, None
        return due

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; all processes must call it."""
        return {
            "tokens_seen": self._tokens_seen,
            "training": gathered(self._training.state()),
            "due": self.due,
            "val_loss": self.val_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint; it may hold more.

        Raises:
            StoreError: for one of another number of processes.
        """
        self._tokens_seen = state["tokens_seen"]
        self._training = WeightedMean(*own_part(state["training"]))
        self.due = state["due"]
        self.val_loss = state["val_loss"]


class WeightedMean:
    """Mean of losses weighted by their targets, in float64, without waiting for the device."""

    def __init__(self, total: Tensor | float = 0.0, weight: int = 0) -> None:
        self._total = total
        self._weight = weight

    def add(self, loss: Tensor, n_targets: int) -> None:
        self._total = self._total + loss.double() * n_targets
        self._weight += n_targets

    @property
    def weight(self) -> int:
        """How many targets it is of."""
        return self._weight

    def value(self, *, over_processes: bool = False) -> float | None:
        """The mean, of all processes' losses together if asked for; None without any."""
        if not self._weight:
            return None
        sums = torch.as_tensor(self._total).new_tensor([float(self._total), self._weight])
        if over_processes:
            add_up(sums)
        return float(sums[0] / sums[1])

    def state(self) -> tuple[float, int]:
        return float(self._total), self._weight
