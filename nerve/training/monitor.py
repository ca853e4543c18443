"""Measures FFN spectra while Lightning trains a model, and stores them in a run that is open."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from nerve.measuring.departures import leave
from nerve.measuring.ffns import FFN
from nerve.measuring.given import check_given
from nerve.measuring.masks import Masks
from nerve.recording.cadence import step_loss
from nerve.recording.recorder import Recorder
from nerve.recording.settings import MonitorSettings
from nerve.storage.store import RunStore
from nerve.training.callbacks import let_go
from nerve.training.fit import (
    FFNSearch,
    awaited_values,
    choice_of,
    require_batches,
    require_validation,
    shares_batches,
    token_counts,
    warn_of_loaders,
    warn_of_nothing,
)
from nerve.training.loggers import StoreLogger
from nerve.training.steps import StepFeatures
from nerve.training.updates import (
    NEVER,
    WeightUpdates,
    is_last_batch,
    last_update,
    validate_next,
)


class FitMonitor(L.Callback):
    """Measures every FFN during a fit, as `SpectralMonitor` describes, and writes rows into a store
    that the caller has opened.

    Args:
        store: where rows are written; flushed after each measurement. Of several processes, which
            share the solving, only rank 0 has a store, the others None.
        ffns, mask, exclude, only_labeled, settings: as in `SpectralMonitor`.
    """

    def __init__(
        self,
        store: RunStore | None,
        *,
        ffns: Sequence[FFN] | None = None,
        mask: Callable[[Any], Masks] | None = None,
        exclude: Collection[int] = (),
        only_labeled: bool = False,
        **settings: Any,
    ) -> None:
        self.settings = MonitorSettings.of(**settings)
        check_given(ffns=ffns, mask=mask, exclude=exclude, layers=self.settings.layers)
        self._ffns = ffns
        self._counted = mask, exclude, only_labeled
        self._search: FFNSearch | None = None
        self._features: StepFeatures | None = None
        self._updates = WeightUpdates()
        self._recorder = Recorder(self.settings, store)

    @property
    def state_key(self) -> str:
        """The name of its state in checkpoints, including those of earlier versions."""
        return "SpectralMonitor"

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, nats per target."""
        return self._recorder.val_loss

    @property
    def n_validated(self) -> int:
        """Targets in the last validation of this process; 0 before the first."""
        return self._recorder.n_validated

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the most recent measurement whose spectra are available."""
        return self._recorder.latest

    @property
    def seconds(self) -> float:
        """Wall time spent measuring, validating, and waiting for spectra."""
        return self._recorder.seconds

    # The cadence

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        require_validation(trainer, self.settings.source)
        begins = trainer.global_step == 0  # otherwise the trainer's last step already has its row
        if begins:
            self._updates.n = 0
        ffns = self._ffns
        if ffns is None:
            self._search = FFNSearch(pl_module, self.settings.layers)
            ffns = self._search.found
        self._recorder.open(
            ffns,
            trainer.strategy.root_device,
            # The store receives the rows themselves.
            [each for each in trainer.loggers if not isinstance(each, StoreLogger)],
            anew=begins,
            rank=trainer.global_rank,
            n_processes=trainer.world_size,
            n_here=trainer.num_devices,
            token_counts=token_counts(trainer),
        )
        choice = choice_of(pl_module, self._recorder.probe, self.settings, *self._counted)
        self._features = StepFeatures(trainer, self._recorder, choice)
        trainer.val_check_interval = NEVER
        trainer.check_val_every_n_epoch = None
        trainer._val_check_time_interval = None  # type: ignore[attr-defined] # of val_check_interval
        # The sanity validation before training serves as that of step 0.
        trainer.num_sanity_val_steps = math.inf if begins and self.settings.begins_at_zero else 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._search is not None:
            self._search.require_complete(pl_module)
            self._search = None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_batches(trainer, self.settings.source)
        last = last_update(trainer, pl_module)
        steps = self.settings.measured_steps(last)
        self._updates.open(trainer, pl_module, steps, self._stop)
        begun = self._updates.n
        if begun == 0:
            self.settings.require_some(last)
        self.begin(trainer, pl_module)
        self._recorder.drop_after(begun)
        if begun == 0 and 0 in steps and not trainer.enable_validation:
            self._label(trainer)
        validate_next(trainer, begun in steps)  # read when Lightning resumes from a checkpoint

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called before anything is measured, once or twice: when a checkpoint has been read."""

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        assert self._features is not None
        self._features.end()
        loss, n_targets = step_loss(outputs)
        # Lightning reports the loss divided by the number of accumulated batches.
        if loss is not None and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        self._recorder.add_training(loss, n_targets)
        validate_next(trainer, self._updates.end_batch(trainer) and self._end_update(trainer))
        self._recorder.end_step()
        if is_last_batch(trainer, batch_idx):
            trainer.should_stop = True  # makes Lightning validate now, whatever the interval

    def _end_update(self, trainer: L.Trainer) -> bool:
        """Ends the step whose features were due; returns whether the next one is due."""
        due_step = self._recorder.due_step
        if due_step is not None and self._updates.n > due_step:
            self._recorder.finish(of_all=trainer.world_size > 1)
        is_due = self._updates.take_due()
        if is_due and not trainer.enable_validation:
            self._label(trainer)
        return is_due

    def _label(self, trainer: L.Trainer) -> None:
        """Labels the current weights in a fit without validation."""
        self._recorder.start_validation()
        self._recorder.label(self._updates.n, trainer.optimizers)
        self._recorder.end_validation()

    # Validation: the loss of every measured step, and the features if the source is held-out data

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if not self._recorder.n_measured:
            warn_of_loaders(trainer)
        self._recorder.start_validation(is_split=shares_batches(trainer))

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        is_of_fit = trainer.state.fn == TrainerFn.FITTING and not dataloader_idx
        if is_of_fit and self.settings.source == "heldout":
            assert self._features is not None
            self._features.expect(batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING or dataloader_idx:
            return
        assert self._features is not None
        self._features.end()
        loss, n_targets = step_loss(outputs)
        if loss is not None:
            self._recorder.add_validation(loss, n_targets)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._recorder.label(self._updates.n, trainer.optimizers)
        if self.settings.source == "heldout":
            self._recorder.finish(of_all=self._recorder.is_split)
        if not trainer.sanity_checking:
            values = awaited_values(trainer, self._recorder)
            # One tensor for all: hundreds of single ones take a millisecond.
            tensors = torch.tensor([*values.values()]).unbind()
            trainer.callback_metrics.update(zip(values, tensors, strict=True))
        self._recorder.end_validation()

    # Training: the features of a whole training step if the source is training data

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder.is_due:
            assert self._features is not None
            self._features.expect(batch)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        # Stop before the backward pass, where activation checkpointing runs the forward pass again.
        self._stop()

    def _stop(self) -> None:
        if self._features is not None:
            self._features.stop()

    def _let_go(self) -> None:
        """Drops every reference to the module."""
        self._updates.close()
        if self._features is not None:
            self._features.close()
            self._features = None
        let_go(self)

    # The end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()
        leave(exception)
        self._recorder.fail(exception)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._updates.close()
        due_step = self._recorder.due_step
        if due_step is not None and due_step not in self._updates.steps:
            self._recorder.drop_due()  # one in between; any other is measured by a fit that resumes
        self._recorder.wait()
        if not (self._recorder.n_measured or self.latest):
            warn_of_nothing(self.settings, self._updates.n)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()
        self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        return {**self._recorder.state_dict(), "n_updates": self._updates.n}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._recorder.load_state_dict(state_dict)
        self._updates.n = state_dict.get("n_updates", 0)  # missing in older checkpoints
