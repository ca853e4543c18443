"""Losses, tokens and the learning rate between measurements: the columns shared by all rows of a
measurement."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nerve.measuring.ffns import FFN, sites_of
from nerve.measuring.messages import gathered, own_part
from nerve.optim import Role
from nerve.recording.solver import Labels


class Cadence:
    """Accumulates losses and tokens from one measured step to the next, and labels that step.

    A step is labeled once its validation is over: with the validation loss of its weights, and the
    mean training loss since the previously labeled step. The label stays in `due` until the
    features of that step have been measured.
    """

    def __init__(self) -> None:
        self.due: Labels | None = None
        """The labels of the upcoming measurement; None between measurements."""
        self.val_loss: float | None = None
        """The last validation loss, nats per target."""
        self._tokens_seen = 0
        self._training = WeightedMean()
        self._labeled = WeightedMean()
        """The training losses averaged in the label in `due`."""
        self._validation = WeightedMean()

    def add_training(self, loss: Tensor | None, n_targets: int | None, n_processes: int) -> None:
        """Counts a batch.

        Args:
            loss: the mean over this process's targets; None if unknown.
            n_targets: their number; None if unknown, in which case batches have equal weight.
            n_processes: number of processes that have this many targets.
        """
        if loss is not None:
            self._training.add(loss, n_targets)
        self._tokens_seen += (n_targets or 0) * n_processes

    def start_validation(self) -> None:
        """Starts a new pass over the held-out set."""
        self._validation = WeightedMean()

    def add_validation(self, loss: Tensor, n_targets: int | None) -> None:
        """Counts a held-out batch; batches without `n_targets` have equal weight."""
        self._validation.add(loss, n_targets)

    def note_validation(self, loss: float) -> None:
        """Takes a validation loss of the labeled weights that was computed elsewhere; the first one
        counts."""
        if self.due is not None and self.due["val_loss"] is None:
            self.val_loss = self.due["val_loss"] = loss

    @property
    def n_validated(self) -> int:
        """Number of targets in the last validation; 0 before this process's first."""
        return self._validation.weight

    def label(self, step: int, lr: float | None, *, n_processes: int, is_split: bool) -> None:
        """Labels the measurement of `step`; all processes must call it.

        Args:
            step: optimizer steps so far.
            lr: the learning rate of the hidden weights.
            n_processes: number of training processes.
            is_split: whether each process evaluated its own part of the held-out set.
        """
        self.val_loss = self._validation.value(over_processes=is_split)
        self.due = {
            "step": step,
            "tokens_seen": self._tokens_seen,
            "train_loss": self._training.value(over_processes=n_processes > 1),
            "val_loss": self.val_loss,
            "lr": lr,
        }
        self._labeled, self._training = self._training, WeightedMean()

    def take_due(self) -> Labels | None:
        """Returns the pending labels and clears them."""
        due, self.due = self.due, None
        self._labeled = WeightedMean()
        return due

    def drop_due(self) -> None:
        """Cancels the pending labels: their step is not measured, and its training losses count
        toward the next one."""
        self.due = None
        self._training.merge(self._labeled)
        self._labeled = WeightedMean()

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint; all processes must call it."""
        return {
            "tokens_seen": self._tokens_seen,
            "training": gathered(self._training.state()),
            "due": self.due,
            "val_loss": self.val_loss,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint, whose state may have further entries.

        Raises:
            StoreError: for a checkpoint of a different number of processes.
        """
        self._tokens_seen = state["tokens_seen"]
        self._training = WeightedMean(*own_part(state["training"]))
        self.due = state["due"]
        self.val_loss = state["val_loss"]


class WeightedMean:
    """Mean of losses weighted by their number of targets, in float64, without synchronizing with
    the device."""

    def __init__(self, total: Tensor | float = 0.0, weight: int = 0) -> None:
        self._total = total
        self._weight = weight

    def add(self, loss: Tensor, n_targets: int | None) -> None:
        """Adds the mean loss of `n_targets` targets; if their number is unknown, it has weight
        1."""
        weight = 1 if n_targets is None else n_targets
        if weight:  # otherwise the mean is NaN
            self._total = self._total + loss.double() * weight
            self._weight += weight

    def merge(self, other: "WeightedMean") -> None:
        """Adds the losses of another mean."""
        self._total = self._total + other._total
        self._weight += other._weight

    @property
    def weight(self) -> int:
        """The number of targets."""
        return self._weight

    def value(self, *, over_processes: bool = False) -> float | None:
        """The mean, over all processes if `over_processes`, which all of them must then request;
        None if there are no losses."""
        states = gathered(self.state()) if over_processes else [self.state()]
        total, weight = (sum(part) for part in zip(*states, strict=True))
        return total / weight if weight else None

    def state(self) -> tuple[float, int]:
        """The arguments that recreate it."""
        return float(self._total), self._weight


def loss_of(output: Any) -> tuple[Tensor, int | None] | None:
    """The mean loss and the number of targets it averages (None if not given); None if the model
    returns no loss.

    Args:
        output: what a model returned. The loss is the entry or attribute `loss`, a tensor with one
            element, as models of transformers have it; `n_targets` beside it is its weight among
            the batches; without it, all have the same weight.
    """
    loss = _entry(output, "loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    n_targets = _entry(output, "n_targets")
    return loss.detach().reshape(()), None if n_targets is None else int(n_targets)


def step_loss(output: Any) -> tuple[Tensor | None, int | None]:
    """The same for what a Lightning step returns, which may also be a bare loss tensor; None for
    each value that is not given."""
    found = loss_of({"loss": output} if isinstance(output, Tensor) else output)
    return (None, None) if found is None else found


def rate_of(optimizers: Sequence[Optimizer], ffns: Sequence[FFN]) -> float | None:
    """The learning rate of the measured weights, as the schedule left it: that of the optimizers
    that hold them, or None if it is not unique. Sharded weights are in no optimizer under that
    name; for them, all optimizers count."""
    measured = {
        id(weight) for ffn in ffns for site in sites_of(ffn) for weight in site.module.parameters()
    }
    holding = [o for o in optimizers if any(id(each) in measured for each in parameters_of(o))]
    rates = {hidden_lr(optimizer) for optimizer in holding or optimizers}
    return rates.pop() if len(rates) == 1 else None


def hidden_lr(optimizer: Optimizer) -> float | None:
    """The current learning rate of the hidden weights, as the schedule left it.

    It comes from the parameter groups with the role `hidden`, or from all groups of an optimizer
    that `build_optimizer` did not make, whose groups have no roles. None if they have several
    rates.
    """
    groups = optimizer.param_groups
    hidden = [group for group in groups if group.get("role") == Role.HIDDEN]
    rates = {float(group["lr"]) for group in hidden or groups}
    return rates.pop() if len(rates) == 1 else None


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """The parameters of all its groups."""
    return [each for group in optimizer.param_groups for each in group["params"]]


def _entry(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
