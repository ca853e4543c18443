"""Measures a model's FFNs during training in any loop, and writes the rows of a run."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nerve.errors import noted
from nerve.measuring.around import Stream, sites_around
from nerve.measuring.clock import Clock
from nerve.measuring.ffns import FFN
from nerve.measuring.groups import NOT_GROUPED, Grouped
from nerve.measuring.masks import ALL, Chosen
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.recording.cadence import Cadence, rate_of
from nerve.recording.pipeline import Pipeline
from nerve.recording.settings import MonitorSettings
from nerve.recording.writer import Logger, SpectraWriter
from nerve.storage.store import RunStore


class Recorder:
    """The calls that a training loop makes so that measured steps become rows; it is independent of
    any framework.

    Between `open` and `close`, at each step to measure: `start_validation`, `add_validation` for
    every held-out batch, `label`, `end_validation`. Each forward pass whose features count runs
    between `start` and `stop`: those of the held-out batches, or those of the next training step.
    `finish` passes the measurement to the `Pipeline`; `end_step` and `drain` write what has been
    solved. Every process of a run must make the same calls.

    Args:
        settings: what is measured, and when.
        store: where rows go; flushed after each measurement. None in processes that do not write:
            all but rank 0. All processes share the solving.
    """

    def __init__(self, settings: MonitorSettings, store: RunStore | None) -> None:
        self.settings = settings
        self.n_measured = 0
        """Number of measurements since it was opened."""
        self._store = store
        self._n_processes = 1
        self._is_split = False
        self._is_validating = False
        self.clock = Clock(torch.device("cpu"))
        """Counts the time that measuring takes."""
        self._seconds_before = 0.0
        self._cadence = Cadence()
        self._probe: Probe | None = None
        self._grouped = NOT_GROUPED
        self._n_measurements = 0
        self._measurement: Measurement | None = None
        self._pipeline: Pipeline | None = None
        self._writer: SpectraWriter | None = None

    @property
    def seconds(self) -> float:
        """Wall time spent measuring, in training steps, too, validating, and waiting for results
        that were not solved in time; on a GPU, the time of that work in the stream of the model.

        It does not include by how much a forward pass is slower because it is observed: without
        CUDA graphs, or with experts one by one.
        """
        return self._seconds_before + self.clock.seconds

    @property
    def is_due(self) -> bool:
        """Whether a labeled step still waits for its features to be measured."""
        return self._cadence.due is not None

    @property
    def due_step(self) -> int | None:
        """The labeled step that waits for its features."""
        return self._cadence.due["step"] if self._cadence.due is not None else None

    @property
    def probe(self) -> Probe:
        """The probe that reads the features, between `open` and `close`."""
        assert self._probe is not None
        return self._probe

    @property
    def is_split(self) -> bool:
        """Whether each process validates its own part of the held-out set."""
        return self._is_split

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, nats per target."""
        return self._cadence.val_loss

    @property
    def n_validated(self) -> int:
        """Number of this process's targets in the last validation; 0 before the first."""
        return self._cadence.n_validated

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the most recent measurement that is solved."""
        return self._writer.latest if self._writer else []

    def write_to(self, store: RunStore | None) -> None:
        """Sets where rows go, if that is known only after `open`; before anything is measured."""
        self._store = store
        if self._writer is not None:
            self._writer.store = store

    def drop_after(self, step: int) -> None:
        """Drops rows after `step`: they belong to an abandoned branch if training starts there."""
        if self._store is not None:
            self._store.truncate_after(step)

    def open(
        self,
        ffns: Sequence[FFN],
        device: torch.device,
        loggers: Sequence[Logger] = (),
        *,
        anew: bool,
        rank: int = 0,
        n_processes: int = 1,
        n_here: int = 1,
        token_counts: Tensor | None = None,
        find_streams: Callable[[], list[Stream | None]] | None = None,
    ) -> None:
        """Installs the probe and starts what solves.

        Args:
            ffns: the FFNs to measure.
            device: where the model trains.
            loggers: receive each measurement with its own step.
            anew: whether training begins at step 0; otherwise losses and tokens keep counting.
            rank: the rank of this process.
            n_processes: number of training processes.
            n_here: how many of them share the cores of this host.
            token_counts: how often each token occurs, for groups by frequency.
            find_streams: finds the streams around FFNs whose descriptions do not name them.
        """
        self._grouped = Grouped(tuple(self.settings.groups), token_counts)
        around = sites_around(ffns, self.settings.sites, find_streams)
        self._seconds_before, self.clock = 0.0 if anew else self.seconds, Clock(device)
        self._is_validating = False
        self._probe = Probe(ffns, around if self.settings.sites else None, self.clock)
        self._probe.install()
        compiler = sys.modules.get("torch._dynamo")
        if compiler is not None and compiler.utils.counters["frames"]:
            torch.compiler.reset()  # code compiled earlier ignores the probe
        if anew:
            self._n_measurements = 0
            self._cadence = Cadence()
        self.n_measured = 0
        self._n_processes = n_processes
        self._writer = SpectraWriter(self._store, loggers, self.settings.spectra)
        self._pipeline = Pipeline(
            ffns,
            device,
            self._writer,
            self.clock,
            rank=rank,
            n_processes=n_processes,
            n_here=n_here,
        )

    # Losses, and the labels of a step

    def add_training(
        self, loss: Tensor | None, n_targets: int | None, *, of_all: bool = False
    ) -> None:
        """Counts a training batch: the mean loss of this process's targets, and their number; with
        `of_all`, that number is of all processes. Either may be unknown, None."""
        self._cadence.add_training(loss, n_targets, 1 if of_all else self._n_processes)

    def start_validation(self, *, is_split: bool = False) -> None:
        """Starts a new pass over the held-out set; `is_split` is explained at the property."""
        if not self._is_validating:
            self._is_validating = True
            self.clock.start()
        self._is_split = is_split
        self._cadence.start_validation()

    def add_validation(self, loss: Tensor, n_targets: int | None) -> None:
        """Counts a held-out batch, weighted by its number of targets if known."""
        self._cadence.add_validation(loss, n_targets)

    def note_validation(self, loss: float) -> None:
        """Takes a validation loss of the labeled weights that was computed elsewhere."""
        self._cadence.note_validation(loss)

    def label(self, step: int, optimizers: Sequence[Optimizer]) -> None:
        """Labels the measurement of `step` with its losses and the learning rate of the measured
        weights."""
        lr = rate_of(optimizers, self.probe.ffns)
        self._cadence.label(step, lr, n_processes=self._n_processes, is_split=self._is_split)

    def end_validation(self) -> None:
        """Stops the clock of the validation."""
        if self._is_validating:
            self._is_validating = False
            self.clock.stop()

    # Features

    def start(self, chosen: Chosen = ALL) -> None:
        """Starts reading the features of a forward pass, for the chosen samples."""
        with self.clock:
            if self._measurement is None:
                self._measurement = self._new_measurement()
            self._measurement.start(chosen)

    def stop(self) -> None:
        """Ends the forward pass, if one is being measured."""
        if self._measurement is not None:
            with self.clock:
                self._measurement.finish_forward()
                self._measurement.stop()

    def finish(self, *, of_all: bool) -> None:
        """Passes the measurement on to be solved; with `of_all`, pooled over all processes, each of
        which saw part of the samples."""
        measurement, due = self._measurement, self._cadence.take_due()
        self._measurement = None
        if measurement is not None and due is not None:
            assert self._pipeline is not None
            self.n_measured += 1
            self._pipeline.submit(due, measurement, of_all=of_all)

    def drop_due(self) -> None:
        """Gives up the labeled step, whose features will not come."""
        self._cadence.drop_due()

    # What is solved

    def end_step(self) -> None:
        """Writes what has been solved by now; call it after each training step."""
        assert self._pipeline is not None
        self._pipeline.end_step()

    def drain(self) -> None:
        """Waits for everything that is being solved, and writes it."""
        if self._pipeline is not None:
            self._pipeline.drain()

    def wait(self) -> None:
        """Drains, and counts the time as overhead because training waits."""
        with self.clock:
            self.drain()

    def abort(self) -> None:
        """Stops reading features, even in the middle of a forward pass."""
        if self._probe is not None:
            self._probe.stop()

    def fail(self, error: BaseException) -> None:
        """Ends recording after an error in training: writes what was measured, unless that needs
        other processes, which may never respond. An exception raised here is added to `error` as a
        note."""
        try:
            with noted(error):
                self.abort()
            if self._n_processes == 1:
                with noted(error):
                    self.drain()
        finally:
            with noted(error):
                self.close(wait=self._n_processes == 1)

    def close(self, *, wait: bool = True) -> None:
        """Removes the probe and ends the threads that solve; pending work is dropped, and no
        reference to the model remains. For `wait` see `Aside.close`."""
        self._measurement = None  # left by a fit that was interrupted
        probe, self._probe = self._probe, None
        pipeline, self._pipeline = self._pipeline, None
        try:
            if probe is not None:
                probe.remove()
        finally:
            if pipeline is not None:
                pipeline.close(wait=wait)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint, after writing all rows up to its step."""
        self.wait()
        return {
            **self._cadence.state_dict(),
            "latest": self.latest,
            "seconds": self.seconds,
            "n_measurements": self._n_measurements,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a checkpoint; all processes must call it."""
        self._cadence.load_state_dict(state)
        if self._writer is not None:
            self._writer.latest = state["latest"]
        self._seconds_before = state["seconds"] - self.clock.seconds
        self._n_measurements = state.get("n_measurements", 0)  # checkpoints of 0.1 lack it

    def _new_measurement(self) -> Measurement:
        assert self._probe is not None
        is_grouped = self._n_measurements % self.settings.groups_every == 0
        self._n_measurements += 1
        return Measurement(
            self._probe,
            shortcut=self.settings.shortcut,
            skip_first=self.settings.skip_first,
            grouped=self._grouped if is_grouped else NOT_GROUPED,
            sites=self.settings.sites if is_grouped else (),
        )
