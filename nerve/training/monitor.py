"""The Lightning callback that measures FFN spectra while a model trains, and stores them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from nerve.config import from_mapping, require
from nerve.errors import MeasurementError, noted
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.optim import hidden_lr
from nerve.recording.means import mean_values
from nerve.recording.recorder import Recorder
from nerve.recording.settings import MonitorSettings
from nerve.storage.store import RunStore
from nerve.training.loggers import StoreLogger


class SpectralMonitor(L.Callback):
    """Measures every FFN at steps 0, k, 2k, … and the last, and writes one row per FFN.

    A row labeled step s holds the features computed with the weights after s optimizer steps, and
    the validation loss of the same weights. The monitor sets Lightning's validation cadence to its
    own; a validation loader that Lightning splits over processes is taken as a whole.
    `validation_step` and `training_step` must return a mapping with the mean `loss` and
    `n_targets`. Measuring draws no random numbers and leaves weights, gradients and modes as they
    are.

    The trainer's loggers get each measurement with its own step, which may be some steps ago:
    `ffn/03/pr_post` is that of layer 3, `ffn/mean/pr_post` the mean over layers. Callbacks such as
    `EarlyStopping` and `ModelCheckpoint` can monitor that mean, or `pr_post`, the mean over all
    FFNs, of the last measurement that is solved when validation ends: that of the same step on the
    CPU, up to two measurements ago on a GPU; with `source="train"` at best the one before.

    Args:
        store: where rows go; flushed after each measurement. None in a process that is not the one
            that writes: of several processes, rank 0. All of them share the solving. A fit that
            begins at step s, from whatever checkpoint, drops the rows past s.
        ffns: the FFNs of a model whose modules do not fulfil the protocol `FFN`; None to look for
            them in the module that is trained.
        settings: those of `MonitorSettings`, by name: `every_n_steps`, `source`, `spectra`,
            `layers`, `shortcut`, `skip_first`, `groups`, `groups_every`, `sites`.

    Raises:
        ConfigError: for a setting that is out of range.

    A module that pads its batches says which samples count with a method `padding_mask(batch)`:
    bool, True for those that do, in the shape of the features without their last dimension. Groups
    by frequency take the tokens from a method `token_ids(batch)`, in that shape, too, and from the
    data module's `token_counts` how often each token id occurs in training.
    """

    def __init__(
        self, store: RunStore | None, *, ffns: Sequence[FFN] | None = None, **settings: Any
    ) -> None:
        self.settings = from_mapping(MonitorSettings, settings, "monitor")
        require(
            ffns is None or self.settings.layers is None,
            "ffns are the ones to measure, so layers must be None beside them; got both. Leave out "
            "those of the other layers.",
        )
        self._ffns = ffns
        self._last_step = math.inf
        self._recorder = Recorder(self.settings, store)

    @property
    def source(self) -> str:
        """Which features are measured: `heldout` or `train`."""
        return self.settings.source

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, nats per target."""
        return self._recorder.val_loss

    @property
    def n_validated(self) -> int:
        """Targets of the last validation, of this process; 0 before the first."""
        return self._recorder.n_validated

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the last measurement that is solved."""
        return self._recorder.latest

    @property
    def seconds(self) -> float:
        """Wall time spent measuring, validating, and waiting for what was not solved in time."""
        return self._recorder.seconds

    # The cadence

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        layers = self.settings.layers
        self._recorder.open(
            find_ffns(pl_module, layers=layers) if self._ffns is None else self._ffns,
            trainer.strategy.root_device,
            # The store has the rows themselves.
            [each for each in trainer.loggers if not isinstance(each, StoreLogger)],
            anew=trainer.global_step == 0,  # else a trainer goes on, and its last step has its row
            rank=trainer.global_rank,
            n_processes=trainer.world_size,
            n_here=trainer.num_devices,
            token_counts=_token_counts(trainer),
        )
        every_n_steps = self.settings.every_n_steps
        trainer.val_check_interval = every_n_steps * trainer.accumulate_grad_batches
        trainer.check_val_every_n_epoch = None
        # The validation before training is that of step 0.
        trainer.num_sanity_val_steps = 0 if trainer.global_step else math.inf

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = _last_step(trainer)
        self._recorder.drop_after(trainer.global_step)
        _warn_of_split_windows(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *batch: Any
    ) -> None:
        loss, n_targets = _step_outputs(outputs)
        # Lightning reports the loss as it was divided for gradient accumulation.
        self._recorder.add_training(loss * trainer.accumulate_grad_batches, n_targets)
        due_step = self._recorder.due_step
        if due_step is not None and trainer.global_step > due_step:
            self._recorder.finish(of_all=trainer.world_size > 1)
        self._recorder.write_solved()
        if trainer.global_step == self._last_step:
            trainer.should_stop = True  # validates now, also when the cadence does not fall here

    # Validation: the loss of every measured step; the features where the source is held-out data

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        shares = trainer.world_size > 1 and any(map(_splits, tree_leaves(trainer.val_dataloaders)))
        self._recorder.start_validation(is_split=shares)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *index: int
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.source == "heldout":
            self._recorder.start(_mask(pl_module, batch), ids=_ids(pl_module, batch))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *batch: Any
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._recorder.add_validation(*_step_outputs(outputs))
        self._recorder.stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._recorder.label(trainer.global_step, hidden_lr(trainer.optimizers[0]))
        if self.source == "heldout":
            self._recorder.finish(of_all=self._recorder.is_split)
        if not trainer.sanity_checking:
            pl_module.log_dict(self._means(trainer), logger=False, sync_dist=True)
        self._recorder.end_validation()

    # Training: the features of a whole training step where the source is training data

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder.is_due:
            self._recorder.start(_mask(pl_module, batch), ids=_ids(pl_module, batch))

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        # Stopped before the backward pass: activation checkpointing runs the forward again there.
        if self._recorder.is_due:
            self._recorder.stop()

    # The end

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        with noted(exception):
            self._recorder.abort()
        if trainer.world_size == 1:  # else the others may never come to exchange their spectra
            with noted(exception):
                self._recorder.drain()
        with noted(exception):
            self._recorder.close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._recorder.drop_due()
        self._recorder.wait()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._recorder.close()

    def state_dict(self) -> dict[str, Any]:
        return self._recorder.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._recorder.load_state_dict(state_dict)

    def _means(self, trainer: L.Trainer) -> dict[str, float]:
        """Those of the last measurement that is solved, in every process."""
        means = trainer.strategy.broadcast(mean_values(self.latest))
        if not means:  # the first one is waited for: a callback may monitor it
            self._recorder.drain()
            means = trainer.strategy.broadcast(mean_values(self.latest))
        return means


def _mask(pl_module: L.LightningModule, batch: Any) -> Tensor | None:
    """Which samples of a batch count, where the module says it."""
    mask_of = getattr(pl_module, "padding_mask", None)
    return None if mask_of is None else mask_of(batch)


def _ids(pl_module: L.LightningModule, batch: Any) -> Tensor | None:
    """The tokens that the samples of a batch are of, where the module says it."""
    ids_of = getattr(pl_module, "token_ids", None)
    return None if ids_of is None else ids_of(batch)


def _token_counts(trainer: L.Trainer) -> Tensor | None:
    """How often each token occurs in training, where the data module says it."""
    data = getattr(trainer, "datamodule", None)
    return getattr(data, "token_counts", None)


def _warn_of_split_windows(trainer: L.Trainer) -> None:
    """Warns of epochs that end within an optimizer step."""
    batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
    if trainer.max_epochs != 1 and math.isfinite(batches) and batches % window:
        rank_zero_warn(
            f"An epoch should be whole steps of accumulate_grad_batches={window} batches; it "
            f"has {batches}, so that measurements fall beside the cadence, and with "
            f"source='train' miss micro-batches. Take "
            f"limit_train_batches={batches - batches % window}."
        )


def _last_step(trainer: L.Trainer) -> float:
    """The optimizer step that ends the fit, infinite where none does."""
    try:
        return trainer.estimated_stepping_batches
    except MisconfigurationException:  # of accumulation that changes from epoch to epoch
        return trainer.max_steps


def _splits(loader: Any) -> bool:
    """Whether a loader gives each process a part of the data, as Lightning makes it by itself;
    those of nerve give each all of the held-out set."""
    return isinstance(getattr(loader, "sampler", None), DistributedSampler)


def _step_outputs(outputs: Any) -> tuple[Tensor, int]:
    if not isinstance(outputs, Mapping) or not {"loss", "n_targets"} <= outputs.keys():
        raise MeasurementError(
            "training_step and validation_step must return a mapping with loss and n_targets (the "
            f"number of targets that the loss is a mean of); got {type(outputs).__name__}."
        )
    return outputs["loss"].detach(), int(outputs["n_targets"])
