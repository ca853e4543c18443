"""The Lightning callback that measures FFN spectra while a model trains, and stores them."""

import logging
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from nerve.config import require, require_choice
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.metric_names import mean_values
from nerve.optim import hidden_lr
from nerve.recording.cadence import Cadence
from nerve.recording.solver import Solved, Solver, spare_workers
from nerve.recording.writer import SpectraWriter
from nerve.storage.store import RunStore
from nerve.training.loggers import StoreLogger

log = logging.getLogger(__name__)

Source = Literal["heldout", "train"]


class SpectralMonitor(L.Callback):
    """Measures every FFN at steps 0, k, 2k, … and the last, and writes one row an FFN.

    A row labelled step s holds the features computed with the weights after s optimizer steps, and
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
            that writes: of several processes, rank 0. All of them share the solving.
        every_n_steps: optimizer steps from one measurement to the next.
        source: `heldout` takes the features of the validation batches, in eval mode: one forward
            pass gives the loss and the spectra. `train` takes those of every micro-batch of the
            training step that follows, in train mode; the last step has no row then.
        spectra: whether eigenvalues are stored beside the metrics; `auto` for d_ff up to 1024.
        layers: the layers to measure; None for all.
        ffns: the FFNs of a model whose modules do not fulfil the protocol `FFN`; None to look for
            them in the module that is trained.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper.
        skip_first: leaves so many positions at the beginning of each sequence out of the features,
            not of the loss.

    A module that pads its batches says which samples count with a method `padding_mask(batch)`:
    bool, True for those that do, in the shape of the features without their last dimension.
    """

    def __init__(
        self,
        store: RunStore | None,
        *,
        every_n_steps: int = 25,
        source: Source = "heldout",
        spectra: bool | Literal["auto"] = "auto",
        layers: Sequence[int] | None = None,
        ffns: Sequence[FFN] | None = None,
        shortcut: bool = True,
        skip_first: int = 0,
    ) -> None:
        require(
            isinstance(every_n_steps, int) and every_n_steps > 0,
            f"monitor.every_n_steps must be a positive whole number; got {every_n_steps!r}.",
        )
        require_choice("monitor.source", source, ("heldout", "train"))
        require(
            spectra in (True, False, "auto"),
            f"monitor.spectra must be true, false or auto; got {spectra!r}.",
        )
        require(
            layers is None or (isinstance(layers, Sequence) and not isinstance(layers, str)),
            f"monitor.layers must be null (all) or a list of layers, [0,3]; got {layers!r}.",
        )
        require(
            ffns is None or layers is None,
            "ffns are the ones to measure, so layers must be None beside them; got both. Leave out "
            "those of the other layers.",
        )
        require(
            isinstance(shortcut, bool),
            f"monitor.shortcut must be true or false; got {shortcut!r}.",
        )
        require(
            isinstance(skip_first, int) and not isinstance(skip_first, bool) and skip_first >= 0,
            f"monitor.skip_first is a number of positions, 0 or more; got {skip_first!r}.",
        )
        self.store = store
        self.every_n_steps = every_n_steps
        self.source = source
        self.spectra = spectra
        self.layers = layers
        self.ffns = ffns
        self.shortcut = shortcut
        self.skip_first = skip_first
        self.seconds = 0.0
        """Wall time spent measuring, validating, and waiting for what was not solved in time."""
        self._share = (0, 1)
        self._sharded = False
        self._last_step = math.inf
        self._probe: Probe | None = None
        self._began = 0.0
        self._solver: Solver | None = None
        self._writer: SpectraWriter | None = None
        self._reset()

    def _reset(self) -> None:
        """What a fit from step 0 starts with."""
        self.seconds = 0.0
        self._measurement: Measurement | None = None
        self._cadence = Cadence()

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, nats a target."""
        return self._cadence.val_loss

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the last measurement that is solved."""
        return self._writer.latest if self._writer else []

    # The cadence

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._probe = Probe(
            find_ffns(pl_module, layers=self.layers) if self.ffns is None else self.ffns
        )
        self._probe.install()
        compiler = sys.modules.get("torch._dynamo")
        if compiler is not None and compiler.utils.counters["frames"]:
            torch.compiler.reset()  # code that was compiled before knows no probe
        if trainer.global_step == 0:  # else a trainer goes on, and its last step has its row
            self._reset()
        trainer.val_check_interval = self.every_n_steps * trainer.accumulate_grad_batches
        trainer.check_val_every_n_epoch = None
        # The validation before training is that of step 0.
        trainer.num_sanity_val_steps = 0 if trainer.global_step else math.inf
        device = trainer.strategy.root_device
        self._share = (trainer.global_rank, trainer.world_size)
        self._solver = Solver(device, spare_workers(device, trainer.num_devices))
        threads = f"{self._solver.n_workers} threads of the host, beside training"
        log.info("spectra are solved on %s", threads if self._solver.n_workers else device)
        # The store has the rows themselves.
        loggers = [each for each in trainer.loggers if not isinstance(each, StoreLogger)]
        self._writer = SpectraWriter(self.store, loggers, self.spectra)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last_step = _last_step(trainer)
        batches, window = trainer.num_training_batches, trainer.accumulate_grad_batches
        if trainer.max_epochs != 1 and math.isfinite(batches) and batches % window:
            rank_zero_warn(
                f"An epoch should be whole steps of accumulate_grad_batches={window} batches; it "
                f"has {batches}, so that measurements fall beside the cadence, and with "
                f"source='train' miss micro-batches. Take "
                f"limit_train_batches={batches - batches % window}."
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss, n_targets = _step_outputs(outputs)
        # Lightning reports the loss as it was divided for gradient accumulation.
        loss = loss * trainer.accumulate_grad_batches
        self._cadence.add_training(loss, n_targets, trainer.world_size)
        due = self._cadence.due
        if due is not None and trainer.global_step > due["step"]:
            self._finish_measurement(of_all=trainer.world_size > 1)
        assert self._solver is not None
        self._write(self._solver.finished())
        if trainer.global_step == self._last_step:
            trainer.should_stop = True  # validates now, also when the cadence does not fall here

    # Validation: the loss of every measured step; the features where the source is held-out data

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._began = time.perf_counter()
        self._cadence.start_validation()
        self._sharded = trainer.world_size > 1 and any(
            map(_splits, tree_leaves(trainer.val_dataloaders))
        )

    def on_validation_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if self.source == "heldout":
            self._start(pl_module, batch)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._cadence.add_validation(*_step_outputs(outputs))
        if self._measurement is not None:
            self._measurement.finish_forward()
            self._measurement.stop()

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._cadence.label(
            trainer.global_step,
            hidden_lr(trainer.optimizers[0]),
            n_processes=trainer.world_size,
            is_split=self._sharded,
        )
        if self.source == "heldout":
            self._finish_measurement(of_all=self._sharded)
        if not trainer.sanity_checking:
            pl_module.log_dict(self._means(trainer), logger=False, sync_dist=True)
        self.seconds += time.perf_counter() - self._began

    # Training: the features of a whole training step where the source is training data

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._cadence.due is not None:
            self._start(pl_module, batch)

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        # Stopped before the backward pass: activation checkpointing runs the forward again there.
        if self._cadence.due is not None and self._measurement is not None:
            self._measurement.finish_forward()
            self._measurement.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._probe is not None:
            self._probe.stop()
        if trainer.world_size == 1:  # else the others may never come to exchange their spectra
            self._drain()
        self._close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._cadence.take_due()
        self._wait()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        if self._solver is not None:
            self._solver.close()
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
        self._measurement = None  # of a fit that was cut off

    def state_dict(self) -> dict[str, Any]:
        self._wait()  # no checkpoint goes before the rows up to its step
        return {
            **self._cadence.state_dict(),
            "latest": self.latest,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._cadence.load_state_dict(state_dict)
        if self._writer is not None:
            self._writer.latest = state_dict["latest"]
        self.seconds = state_dict["seconds"]

    def _start(self, pl_module: L.LightningModule, batch: Any) -> None:
        if self._measurement is None:
            assert self._probe is not None
            self._measurement = Measurement(
                self._probe, shortcut=self.shortcut, skip_first=self.skip_first
            )
        mask_of = getattr(pl_module, "padding_mask", None)
        self._measurement.start(None if mask_of is None else mask_of(batch))

    def _finish_measurement(self, *, of_all: bool) -> None:
        """Hands the measurement on; that of all processes where each saw a part of the samples."""
        measurement, due = self._measurement, self._cadence.take_due()
        self._measurement = None
        if measurement is not None and due is not None:
            assert self._solver is not None
            if of_all:
                measurement.reduce()
            self._write(self._solver.submit(due, measurement.eigenproblems(*self._share)))

    def _means(self, trainer: L.Trainer) -> dict[str, float]:
        """Those of the last measurement that is solved, in every process."""
        means = trainer.strategy.broadcast(mean_values(self.latest))
        if not means:  # the first one is waited for: a callback may monitor it
            self._drain()
            means = trainer.strategy.broadcast(mean_values(self.latest))
        return means

    def _wait(self) -> None:
        """Drains, where training stands still for it."""
        began = time.perf_counter()
        self._drain()
        self.seconds += time.perf_counter() - began

    def _drain(self) -> None:
        if self._solver is not None:
            self._write(self._solver.drain())

    def _write(self, solved: Iterable[Solved]) -> None:
        assert self._writer is not None
        self._writer.write(solved)


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
