"""`nerve.SpectralMonitor`: measures a model while Lightning trains it, and records the run."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from nerve.errors import noted
from nerve.measuring.ffns import FFN
from nerve.measuring.given import explicit
from nerve.measuring.masks import Masks
from nerve.recording.given import watched_config
from nerve.recording.run import RecordedRun, device_name, recorded_run, seed_of
from nerve.recording.settings import MonitorSettings
from nerve.training.ending import early_stopping
from nerve.training.fit import warn_of_intervals
from nerve.training.monitor import FitMonitor


class SpectralMonitor(FitMonitor):
    """Measures every FFN at steps 0, k, 2k, … and the last step of a fit, and records the run.

    ```
    monitor = nerve.SpectralMonitor("outputs/mine", config={"optimizer": {"lr": lr}})
    L.Trainer(max_steps=1000, callbacks=[monitor]).fit(module, training, validation)
    ```

    A row with step s holds the features computed with the weights after s updates, and the
    validation loss of the same weights. Updates are Lightning's global steps; with manual
    optimization, optimizers that each step once in a batch count as one update. Lightning validates
    at the measured steps, and at no others; of several validation loaders, the first is used. A
    validation loader that Lightning distributes over processes is evaluated as a whole.

    What the module's steps return is used if possible: a tensor, or the entry `loss` of a mapping,
    is the mean loss of a batch; the entry `n_targets` is its weight and is added to `tokens_seen`.
    Measuring draws no random numbers and leaves weights, gradients and modes unchanged.

    The run is done when the fit ends. If the fit raises, the run is failed or interrupted, and
    everything measured so far is stored. `trainer.fit(ckpt_path=…)` continues it from any
    checkpoint of a fit with this callback, and so does a second fit of the same trainer; rows after
    the step of the checkpoint are dropped.

    The trainer's loggers receive each measurement with its own step, which may be a few steps old:
    `ffn/03/pr_post` for layer 3, `ffn/mean/pr_post` for the mean over layers. Callbacks such as
    `EarlyStopping` and `ModelCheckpoint` can monitor these values, or `pr_post`, the mean over all
    FFNs. They are those of the latest measurement that is solved when validation ends: of the same
    step on a CPU, up to four measurements old on a GPU; with `source="train"` at best the previous
    one. The first measurement is waited for if a callback or scheduler monitors such a value.

    Of several processes, which share the solving, rank 0 records the run.

    Args:
        directory: the run directory.
        every_n_steps, steps: as in `nerve.watch`; the fit says which step is the last.
        source: `heldout` or `train`; the default has the validation loss of the same forward passes
            and requires validation batches.
        mask: returns a batch's mask, as in `nerve.measure`. By default the module's method
            `padding_mask(batch)`, if it has one, or else the attention masks of a batch that is a
            mapping and has them.
        exclude, only_labeled: as in `nerve.measure`, for batches that are mappings. Which tokens an
            FFN receives is determined by calling the part of the module that contains all FFNs with
            such a batch, shortened.
        others: as in `nerve.watch`; a residual stream that the model does not declare is not looked
            for. Groups by frequency require a data module with `token_counts`.

    Raises:
        ConfigError: for a setting that is out of range, and at the start of a fit in which nothing
            would be measured.

    When training begins, it raises the errors of `nerve.watch`.
    """

    @explicit(
        heldout='Give source="heldout", and the fit a validation loader.',
        select="Give ffns=nerve.find_ffns(model, batch, select=…).",
        labels="Give config=, which distinguishes your runs.",
        token_counts="The data module has it as an attribute.",
    )
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_steps: int | None = MonitorSettings.every_n_steps,
        steps: Sequence[int] | str | None = None,
        source: str = MonitorSettings.source,
        config: Mapping[str, Any] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        mask: Callable[[Any], Masks] | None = None,
        exclude: Collection[int] = (),
        only_labeled: bool = False,
        ffns: Sequence[FFN] | None = None,
        layers: Sequence[int] | None = None,
        spectra: bool | str = MonitorSettings.spectra,
        shortcut: bool | str = MonitorSettings.shortcut,
        skip_first: int = MonitorSettings.skip_first,
        groups: Sequence[str] = (),
        groups_every: int = MonitorSettings.groups_every,
        sites: Sequence[str] = (),
    ) -> None:
        super().__init__(
            None,
            ffns=ffns,
            mask=mask,
            exclude=exclude,
            only_labeled=only_labeled,
            every_n_steps=every_n_steps,
            steps=steps,
            source=source,
            spectra=spectra,
            layers=layers,
            shortcut=shortcut,
            skip_first=skip_first,
            groups=groups,
            groups_every=groups_every,
            sites=sites,
        )
        self._directory, self._fingerprints = directory, dict(fingerprints or {})
        self._config = watched_config(
            directory,
            config,
            self.settings,
            fingerprints=fingerprints,
            mask=mask,
            exclude=exclude,
            only_labeled=only_labeled,
            ffns=ffns,
            token_counts=None,
        )
        self._n_parameters = 0
        self._run: AbstractContextManager[RecordedRun | None] | None = None
        self._recorded: RecordedRun | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            warn_of_intervals(trainer)
        super().setup(trainer, pl_module, stage)
        # Later, a strategy may have sharded them.
        self._n_parameters = sum(parameter.numel() for parameter in pl_module.parameters())

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._run is not None:
            return
        run = recorded_run(
            self._directory,
            self._config,
            resume=trainer.ckpt_path is not None or trainer.global_step > 0,
            how_to_resume="trainer.fit(ckpt_path=…)",
            seed=seed_of(self._config),
            fingerprints=self._fingerprints,
            n_parameters=self._n_parameters,
            device=device_name(trainer.strategy.root_device),
        )
        self._recorded, self._run = run.__enter__(), run
        self._recorder.write_to(self._recorded and self._recorded.store)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._recorded is not None:
            # A resumed run still has the final values of the end that it abandons.
            self._recorded.record.update(step=self._updates.n, final={}, stopped_by=None)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        if self._recorded is not None:
            self._recorded.heartbeat.note_step(self._updates.n)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        try:
            super().on_exception(trainer, pl_module, exception)
        finally:
            with noted(exception):
                self._end(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if self._recorded is not None:
            record = self._recorded.record
            record.final = {"val_loss": self.val_loss, "measuring_seconds": self.seconds}
            record.stopped_by = early_stopping(trainer)
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        """Ends the run, if one is open: as done, or with the error."""
        run, self._run, self._recorded = self._run, None, None
        if run is None:
            return
        if error is None:
            run.__exit__(None, None, None)
        else:
            run.__exit__(type(error), error, error.__traceback__)
