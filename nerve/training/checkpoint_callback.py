"""The Lightning callback that saves a run so that it can resume exactly where it stopped."""

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from nerve.files import as_store_error, require_there
from nerve.measuring.messages import gathered, own_part
from nerve.storage.directory import RunDirectory
from nerve.storage.store import RunStore
from nerve.training.agreement import Agreement
from nerve.training.checkpoint_files import identity_of, weights_of, write_checkpoint
from nerve.training.checkpoint_io import CheckpointCadence, CheckpointFiles
from nerve.training.ending import follows_a_rule, take_timers
from nerve.training.fit import callbacks_of
from nerve.training.randomness import random_states, set_random_states
from nerve.training.signals import Interrupted, StopSignals

log = logging.getLogger(__name__)

_SAVE, _STOP = 1, 2


class Checkpointing(Checkpoint):
    """Saves at a cadence, at the end, and when a signal or `trainer.max_time` asks the run to stop;
    then it stops the run.

    The checkpoint of step s is the state after s optimizer steps and the validation at that step:
    weights, optimizer, schedule, data position, the random states of every process, and the states
    of the other callbacks. All rows up to step s are written before it; when the run is resumed,
    the monitor drops later rows. The weights with the lowest validation loss are kept in memory and
    written together with the checkpoint. The weights of the steps to keep are written immediately;
    when the run is resumed, those of later steps are deleted.

    Args:
        files: the plugin through which Lightning saves.
        run: the run directory.
        cadence: when to save.
        signals: the signals that may ask the run to stop.
        store: its rows are flushed before each checkpoint; None in a process that does not write.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        run: RunDirectory,
        cadence: CheckpointCadence,
        signals: StopSignals,
        store: RunStore | None,
    ) -> None:
        self.data_dims: dict[str, Any] = {}
        """The model's dimensions that come from the data, for `load_model`; set before the fit."""
        self.scores: dict[str, float] = {}
        """The values that the last validation logged: `val_loss`, …"""
        self._files = files
        self._files.reserve(run)
        self._run = run
        self._cadence = cadence
        self._signals = signals
        self._store = store
        self._wish = 0
        self._agreement = Agreement()
        self._allowed = self._deadline = math.inf
        self._saved_at = time.monotonic()
        self._began = 0.0
        self._seconds_before = 0.0
        self._random: list[dict[str, Any]] = []
        self._had_stopped = False
        self._best: _Snapshot | None = None
        self._lowest: float | None = None

    @property
    def seconds(self) -> float:
        """Wall time of the fit, including the time before the run was resumed."""
        return self._seconds_before + time.perf_counter() - self._began

    # The state of a run that nothing else stores

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores,
            "seconds": self.seconds,
            "lowest": self._lowest,
            "random": gathered(random_states()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.scores = state_dict["scores"]
        self._seconds_before = state_dict["seconds"]
        self._lowest = state_dict["lowest"]
        self._random = state_dict["random"]

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["facts"] = self.data_dims
        if self._store:  # only the process that writes has the record
            checkpoint |= identity_of(self._run.require_record())
        # Only early stopping also stops the resumed run; a signal or a time limit does not.
        checkpoint["should_stop"] = trainer.should_stop and follows_a_rule(trainer)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._had_stopped = checkpoint.get("should_stop", False)

    def setup(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        self._allowed = take_timers(trainer)

    def on_sanity_check_start(self, *args: Any) -> None:
        self._signals.install()  # Lightning has just replaced the handlers with its own

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._agreement = Agreement()
        self._drop_kept_after(trainer.global_step)
        self._keep(trainer, pl_module)
        if self._random:
            set_random_states(own_part(self._random))
        if self._had_stopped:
            trainer.should_stop = True
        if self._allowed < math.inf:
            self._deadline = time.monotonic() + self._allowed
        self._signals.defer()

    # A state is taken at the end of a step, or of the validation at that step, because Lightning
    # can resume from there. It is written a little later, because Lightning logs the step's scalars
    # only after that.

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        n_batches = batch_idx + 1
        if n_batches % trainer.accumulate_grad_batches:
            return  # in the middle of an optimizer step
        self._keep(trainer, pl_module)
        # All processes know when a number of steps is reached; signals and time limits have to be
        # agreed on, because a single process may notice them.
        self._wish = max(
            _SAVE if self._cadence.is_due_at(trainer.global_step) else 0,
            self._agreement.on(self._own_wish()),
        )
        assert trainer.val_check_batch is not None
        validates_next = trainer.should_stop or n_batches % trainer.val_check_batch == 0
        if self._wish and not validates_next:
            self._take(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged = trainer.callback_metrics
        self.scores = {name: float(logged[name]) for name in logged if name.startswith("val_")}
        if self._lowest is None or self.scores["val_loss"] < self._lowest:
            self._lowest = self.scores["val_loss"]
            self._keep_best(trainer, pl_module)
        if self._wish or trainer.should_stop:
            self._take(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self._write(trainer)
        if self._wish == _STOP:
            if self._is_out_of_time and not self._signals.received:
                raise Interrupted(f"the {self._allowed:g} s of trainer.max_time are over")
            self._signals.stop()

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._write(trainer)

    @property
    def _is_out_of_time(self) -> bool:
        return self._deadline < math.inf and time.monotonic() >= self._deadline

    def _own_wish(self) -> int:
        """What this process asks all processes to do."""
        if self._signals.received or self._is_out_of_time:
            return _STOP
        return _SAVE if self._cadence.is_due_after(time.monotonic() - self._saved_at) else 0

    def _take(self, trainer: L.Trainer) -> None:
        with self._files.taking():
            trainer.save_checkpoint(self._run.checkpoint("last"))
        self._saved_at = time.monotonic()

    def _drop_kept_after(self, step: int) -> None:
        if not self._store:
            return
        passed = set(self._run.kept_steps())
        for late in (kept for kept in passed if kept > step):
            with as_store_error(self._run.path):
                self._run.kept_checkpoint(late).unlink()
        missed = sorted(kept for kept in self._cadence.keep if kept < step and kept not in passed)
        if missed:
            log.warning(
                "the run resumes at step %d, after steps %s in checkpoint.keep: their weights "
                "are not saved",
                step,
                ", ".join(map(str, missed)),
            )

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step not in self._cadence.keep:
            return
        weights = self._weights(trainer, pl_module)
        if self._store:
            require_there(self._run.path)
            write_checkpoint(self._run.kept_checkpoint(trainer.global_step), weights)

    def _keep_best(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = self._weights(trainer, pl_module)
        if not self._store:
            return
        self._best = self._best or _Snapshot()
        self._best.take(weights | {"val_loss": self._lowest})

    def _weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """The result of `weights_of`; every process must call this."""
        checkpoint = {
            "state_dict": trainer.strategy.lightning_module_state_dict(),  # a collective call
            "global_step": trainer.global_step,
        }
        # A callback that averages weights inserts the averaged ones, which were validated.
        for callback in callbacks_of(trainer):
            callback.on_save_checkpoint(trainer, pl_module, checkpoint)
        return weights_of(checkpoint)

    def _write(self, trainer: L.Trainer) -> None:
        if not (self._store and self._files.holds):
            return
        require_there(self._run.path)
        self._store.flush(trainer.global_step)
        if self._best:
            self._best.write(self._run.checkpoint("best"))
        self._files.write()


class _Snapshot:
    """A copy of weights on the host, taken without waiting for the device."""

    def __init__(self) -> None:
        self._weights: dict[str, Tensor] = {}
        self._rest: dict[str, Any] = {}
        self._is_new = False

    def take(self, weights: Mapping[str, Any]) -> None:
        """Copies the tensors of `weights["model"]`, overwriting the previous copy."""
        for name, tensor in weights["model"].items():
            if name not in self._weights:
                self._weights[name] = torch.empty_like(
                    tensor, device="cpu", pin_memory=tensor.is_cuda
                )
            self._weights[name].copy_(tensor, non_blocking=True)
        self._rest = {name: value for name, value in weights.items() if name != "model"}
        self._is_new = True

    def write(self, path: Path) -> None:
        """Writes the latest copy, unless it has been written."""
        if not self._is_new:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        write_checkpoint(path, {"model": self._weights, **self._rest})
        self._is_new = False
