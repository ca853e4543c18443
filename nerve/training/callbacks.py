"""Lightning callbacks that show a run's progress: in run.json, and as a progress bar."""

import math
import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from nerve.recording.heartbeat import Heartbeat

SHOWN_EVERY_S = 0.25
"""How often a terminal shows the loss, because reading it waits for the device."""


def let_go(callback: L.Callback) -> None:
    """Removes the references to a finished fit's module, and so to its trainer and optimizers:
    Lightning sets the module's `log` methods on each callback."""
    for name in ("log", "log_dict"):
        vars(callback).pop(name, None)


class StepNotes(L.Callback):
    """Tells the heartbeat of a run the step that training has reached.

    Args:
        heartbeat: that of the run.
    """

    def __init__(self, heartbeat: Heartbeat) -> None:
        self._heartbeat = heartbeat

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._heartbeat.note_step(trainer.global_step)

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        let_go(self)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        let_go(self)


class _Nowhere:
    """A file that forgets what is written."""

    def write(self, text: str) -> None:
        pass

    def flush(self) -> None:
        pass


class RunProgressBar(TQDMProgressBar):
    """One progress bar over the training batches; validation has no bar of its own.

    It fits into 80 columns. In a file it is a line every 50 batches and after the last one. The
    rate and the remaining time count only the batches of this process, not those done before the
    run was resumed.

    Args:
        unit: what the rate counts (`tokens`, `images`).
    """

    BAR_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

    def __init__(self, unit: str) -> None:
        # A terminal is redrawn often; a file (a cluster job's log) gets a line occasionally.
        self._is_on_terminal = sys.stdout.isatty()
        self._shown_every_s = SHOWN_EVERY_S if self._is_on_terminal else 0.0
        super().__init__(refresh_rate=1 if self._is_on_terminal else 50)
        self._shown = -math.inf
        self._unit = unit
        self._n_targets = 0
        self._seconds = 0.0
        self._batch_began = 0.0

    def init_sanity_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def init_train_tqdm(self) -> Tqdm:
        if self._is_on_terminal:
            return super().init_train_tqdm()
        # Lightning redraws it whenever anything changes; `on_train_batch_end` prints the lines.
        return Tqdm(
            disable=self.is_disabled, smoothing=0, bar_format=self.BAR_FORMAT, file=_Nowhere()
        )

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        # Lightning sets these when an epoch starts, but a resumed run starts in the middle of one.
        bar = self.train_progress_bar
        bar.total = trainer.num_training_batches
        bar.initial = bar.n = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        self._batch_began = time.perf_counter()
        super().on_train_batch_start(trainer, *args, **kwargs)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        self._seconds += now - self._batch_began
        self._n_targets += outputs["n_targets"] * trainer.world_size
        is_last = batch_idx + 1 == self.train_progress_bar.total
        if is_last or now - self._shown >= self._shown_every_s:
            self._shown = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            bar = self.train_progress_bar
            if not self._is_on_terminal and self._should_update(batch_idx + 1, bar.total):
                print(bar, flush=True)

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        logged = trainer.callback_metrics
        shown: dict[str, int | str | float | dict[str, float]] = {
            short: float(logged[name]) for name, short in _SHOWN.items() if name in logged
        }
        if "acc" in shown:
            shown.pop("val", None)  # both would be too wide next to the rate
        if self._seconds:
            shown[f"{self._unit}/s"] = Tqdm.format_sizeof(self._n_targets / self._seconds)
        return shown


_SHOWN = {"train_loss": "loss", "val_loss": "val", "val_accuracy": "acc"}
"""The logged values that the bar shows, and their names in it."""
