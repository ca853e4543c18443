"""Lightning modules: loss, logging, optimizer and schedule, but no measuring."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from nerve.measuring.collectives import add_up, highest
from nerve.measuring.processes import n_processes
from nerve.models import Penalty, Regularizer
from nerve.optim import Schedule
from nerve.training.device_errors import is_of_device
from nerve.training.divergence import Divergence, diverged
from nerve.training.graphs import Batch, CompiledLosses, choose, own_gradients
from nerve.training.randomness import part_from_other_processes

NO_REGULARIZER = Regularizer()

CHECK_EVERY_N_LOSSES = 50
"""How often to check for a diverged loss on a GPU; on the CPU it is checked after every batch."""


class TrainedModel(L.LightningModule):
    """Trains a model that maps the first part of a batch to logits for the second.

    Logs `train_loss` and `val_loss` (cross-entropy, nats per target). Training and validation steps
    return the mean `loss` and `n_targets`, the number of targets that it is averaged over. The term
    of a regularizer is logged as `penalty`; the loss that a step returns then has the value of the
    cross-entropy alone and the gradient of their sum.

    Args:
        model: the network; called with the batch's inputs, returns logits `[..., n_classes]`.
        build_optimizer: returns the optimizer for the model.
        schedule: learning-rate schedule over the trainer's `max_steps`.
        compile: whether training runs model and loss as one compiled graph, with CUDA graphs where
            they are faster; validation is not compiled, because its last batch may be smaller.
        regularizer: of the features in training, computed per micro-batch and process.
    """

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module], Optimizer],
        schedule: Schedule,
        *,
        compile: bool = False,
        regularizer: Regularizer = NO_REGULARIZER,
    ) -> None:
        super().__init__()
        self.model = model
        self._build_optimizer = build_optimizer
        self._schedule = schedule
        self._divergence = Divergence()
        self._clipped: list[nn.Parameter] | None = None
        self._penalty = Penalty(model, regularizer) if regularizer.name != "none" else None
        self._compiled = CompiledLosses(self._losses) if compile else None
        self._has_chosen = False
        self._begins_update = False

    def on_fit_start(self) -> None:
        self._has_chosen = False
        # A fit that resumes in the middle of an accumulation does not zero the gradients first.
        self._begins_update = True
        self._divergence = Divergence()  # an earlier fit may have diverged
        self._clipped = None
        part_from_other_processes(self.global_rank)  # Lightning gives all processes one seed

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        (loss, penalty), targets = self._training_losses(batch), batch[1]
        # Over all processes, as in the metric rows; if one process diverges, all of them stop.
        mean = _mean_over_processes(loss.detach())
        self._divergence.note(self.global_step, mean)
        if penalty is not None:
            self.log("penalty", penalty, sync_dist=True)
        # With prog_bar=True Lightning would read it after every batch and wait for the device each
        # time; `RunProgressBar` reads it only when the bar is drawn.
        self.log("train_loss", mean)
        return {"loss": loss, "n_targets": targets.numel()}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        loss, logits = self._loss(batch)
        n_targets = batch[1].numel()
        self._divergence.note(self.global_step, loss.detach())
        self.log("val_loss", loss, prog_bar=True, batch_size=n_targets, sync_dist=True)
        self._log_validation(logits, batch[1])
        return {"loss": loss, "n_targets": n_targets}

    def on_validation_epoch_end(self) -> None:
        # Lightning would label validation with the batches before the last update; we count updates
        self.log("step", float(self.global_step), sync_dist=True)
        first = -highest(-self._divergence.first(), self.device)
        self._divergence.note_first(first)
        self._divergence.raise_at(self.global_step)  # no training loss follows the last update

    def on_validation_end(self) -> None:
        # The loggers have received it; callbacks would see an outdated step until the next
        # validation.
        self.trainer.callback_metrics.pop("step", None)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Reading them waits for the device. Not by batch_idx: epochs may be shorter.
        if self.device.type == "cpu" or self._divergence.n_kept >= CHECK_EVERY_N_LOSSES:
            self._divergence.raise_at(self.global_step)

    def on_validation_start(self) -> None:
        self._divergence.raise_at(self.global_step)

    def on_train_end(self) -> None:
        self._divergence.raise_at(self.global_step)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None or gradient_clip_val <= 0:
            return  # off, as everywhere in Lightning
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            # Such an optimizer (fused=True) unscales the gradients itself when it steps, so
            # Lightning leaves them scaled and then refuses to clip them.
            scaler.unscale_(optimizer)
        if self._clipped is None:
            self._clipped = list(self.parameters())  # walking all modules in every step takes time
        sharded = self.trainer.model
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self._clipped, gradient_clip_val)
        elif isinstance(sharded, FullyShardedDataParallel):
            # Each process holds a shard; only the wrapper knows the norm of all gradients.
            sharded.clip_grad_norm_(gradient_clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(self._clipped, gradient_clip_val)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        super().optimizer_zero_grad(epoch, batch_idx, optimizer)
        self._begins_update = True

    def on_after_backward(self) -> None:
        is_replaying = self._compiled is not None and self._compiled.is_replaying
        if is_replaying and self._begins_update and self.trainer.accumulate_grad_batches > 1:
            own_gradients(self.parameters())
        self._begins_update = False

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().optimizer_step(*args, **kwargs)
        except RuntimeError as error:  # from a matrix decomposition, for example
            if is_of_device(error) or all(map(_is_finite, self.parameters())):
                raise
            raise diverged(self.global_step) from error

    def configure_optimizers(self) -> Any:
        optimizer = self._build_optimizer(self.model)
        scheduler = self._schedule.scheduler(optimizer, int(self.trainer.max_steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _training_losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """`_losses` of a training batch, compiled if so configured."""
        if self._compiled is None:
            return self._losses(batch)
        if not self._has_chosen and self._trainer is not None:
            self._has_chosen = True
            self._compiled.replay(choose(self.trainer, self.model, self._n_positions(batch)))
        return self._compiled(batch)

    def _n_positions(self, batch: Batch) -> int:
        """How many vectors each matrix of the model multiplies."""
        return batch[1].numel()

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The loss, with the gradient of the regularizer's term, and that term; not the logits,
        which compiled code would then have to keep."""
        if self._penalty is None:
            return self._loss(batch)[0], None
        self._penalty.start()
        loss, _ = self._loss(batch)
        penalty = self._penalty.finish()
        return loss + (penalty - penalty.detach()), penalty.detach()

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        logits = self(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten()), logits

    def _log_validation(self, logits: Tensor, targets: Tensor) -> None:
        """Logs what a task reports in addition to the loss."""


def _is_finite(parameter: nn.Parameter) -> bool:
    """Whether a parameter and its gradient are finite."""
    tensors = (parameter, parameter.grad)
    return all(tensor is None or bool(tensor.isfinite().all()) for tensor in tensors)


def _mean_over_processes(loss: Tensor) -> Tensor:
    n = n_processes()
    if n == 1:
        return loss
    total = loss.clone()
    add_up(total)
    return total / n


class LanguageModel(TrainedModel):
    """Next-token prediction: inputs `[batch, seq]`, targets `[batch, seq]`, both token ids."""


class ImageClassifier(TrainedModel):
    """Image classification: inputs `[batch, channels, height, width]`, targets `[batch]` labels.

    Logs `val_accuracy`, a fraction, in addition to the losses.
    """

    def _n_positions(self, batch: Batch) -> int:
        n_patches: int = getattr(getattr(self.model, "config", None), "n_patches", 1)
        return len(batch[1]) * n_patches

    def _log_validation(self, logits: Tensor, targets: Tensor) -> None:
        correct = (logits.argmax(-1) == targets).float().mean()
        self.log("val_accuracy", correct, prog_bar=True, batch_size=len(targets), sync_dist=True)
