"""`nerve.watch`: measures a model while a plain loop trains it, and records the run."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nerve.config import from_mapping, require
from nerve.integrations.features import TrainingFeatures
from nerve.integrations.heldout import Forward, batches_of, evaluate
from nerve.integrations.wrapping import device_name_of, device_of, unwrapped
from nerve.measuring.around import Stream, find_streams
from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.distributed import n_processes, rank
from nerve.measuring.ffns import FFN
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call, evaluating
from nerve.measuring.masks import Masks
from nerve.measuring.streams import count_tokens
from nerve.recording.recorder import Recorder
from nerve.recording.run import RecordedRun, recorded_run
from nerve.recording.settings import MonitorSettings

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Least time between two writings of run.json while training goes on."""


@contextmanager
def watch(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    every_n_steps: int = 100,
    config: Mapping[str, Any] | None = None,
    optimizer: Optimizer | None = None,
    heldout: Iterable[Any] | None = None,
    forward: Forward | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    ffns: Sequence[FFN] | None = None,
    resume: Mapping[str, Any] | None = None,
    token_counts: Tensor | None = None,
    **settings: Any,
) -> Iterator["WatchedLoop"]:
    """Measures a model's FFNs at steps 0, k, 2k, … of a training loop, and records the run.

    ```
    with nerve.watch(model, "outputs/mine", every_n_steps=100, config={"lr": lr}) as run:
        for inputs, targets in batches:
            ...
            optimizer.step()
            run.step(loss, targets.numel())
    ```

    A row labeled step s holds the features computed with the weights after s steps: of the training
    batch that follows, with all its micro-batches, in train mode; or of held-out batches, in eval
    mode, and then the last step has a row, too. Measuring draws no random numbers and leaves
    weights, gradients and modes as they are. Where the block ends the run is done; where it raises,
    the run has failed, or was interrupted, and everything that was measured is stored.

    Several processes (DistributedDataParallel) measure their samples together, and rank 0 records
    the run. All of them must call all of it alike, `state_dict` too.

    Args:
        model: the module that the loop calls, with its weights of the step to begin at: also one
            that is compiled or distributed.
        directory: the run directory.
        every_n_steps: steps from one measurement to the next.
        config: whatever tells your runs apart, by name; what is measured is added as `monitor`. Its
            `seed`, if it is a number, is the run's.
        optimizer: gives the learning rate of the rows; null without, or where groups differ.
        heldout: batches whose features are measured in place of those of training; of several
            processes, each gives its own part.
        forward: runs the model on a held-out batch; by default `model(batch)`, or `model(**batch)`
            for a mapping. If what it returns has a `loss`, it is the validation loss, weighted by
            `n_targets` where that is there, too.
        mask: gives a batch's mask, as `nerve.measure` takes it; a training batch is what the model
            is called with: the one argument, the mapping of keyword arguments, or the tuple of
            positional ones. By default the attention masks of a mapping that has them.
        exclude, only_labeled: as `nerve.measure` takes them.
        ffns: descriptions of the FFNs; None for what `nerve.find_ffns` finds.
        resume: what `state_dict` gave; rows past its step are dropped. Without it training begins
            at step 0, and so does the run.
        token_counts: how often each token id occurs in the training text, for groups by frequency;
            None counts the held-out batches.
        settings: `spectra`, `layers`, `shortcut`, `skip_first`, `groups`, `groups_every`, `sites`,
            as the monitor of nerve-run has them. Where a model does not say where its residual
            stream is, the first held-out batch shows it.

    Raises:
        ConfigError: for a setting that is out of range.
        MeasurementError: for a model without FFNs, or features, masks or descriptions that are not
            what they are said to be.
        StoreError: when the directory holds a run of another configuration, or one that is done.
    """
    chosen = from_mapping(
        MonitorSettings,
        {
            **settings,
            "every_n_steps": every_n_steps,
            "source": "train" if heldout is None else "heldout",
        },
        "monitor",
    )
    require(
        ffns is None or chosen.layers is None,
        "ffns are the ones to measure, so layers must be None beside them; got both. Leave out "
        "those of the other layers.",
    )
    config = dict(config or {})
    require(
        "monitor" not in config,
        "monitor is what is measured, which config= gets by itself; got a value for it. Give that "
        "one another name.",
    )
    seed = config.get("seed")
    counted: dict[str, Any] = {"exclude": sorted(exclude), "only_labeled": only_labeled}
    choose = partial(
        Choice,
        mask=mask,
        skips_first=chosen.skip_first > 0,
        groups=bool(chosen.groups),
        **counted,
    )
    inner = unwrapped(model)
    batches = None if heldout is None else batches_of(heldout)
    if ffns is None:
        first = None if batches is None else batches[0]
        ffns = find_ffns(inner, first, layers=chosen.layers, forward=forward)
        log.info("FFNs to measure:\n%s", ffns)
    if "frequency" in chosen.groups and token_counts is None and batches is not None:
        token_counts = count_tokens(batches)
    with recorded_run(
        directory,
        {**config, "monitor": asdict(chosen) | counted},
        goes_on=resume is not None,
        seed=seed if isinstance(seed, int) and not isinstance(seed, bool) else None,
        n_parameters=sum(parameter.numel() for parameter in inner.parameters()),
        device=device_name_of(inner),
    ) as recorded:
        loop = WatchedLoop(model, chosen, optimizer, recorded)
        try:
            loop._begin(ffns, choose, batches, forward or call, resume, token_counts)
            yield loop
            loop._end()
        except BaseException:
            loop._abort()
            raise
        finally:
            loop._close()


class WatchedLoop:
    """What a training loop tells of its steps; `nerve.watch` gives it."""

    def __init__(
        self,
        model: nn.Module,
        settings: MonitorSettings,
        optimizer: Optimizer | None,
        recorded: RecordedRun | None,
    ) -> None:
        self.n_steps = 0
        """Steps so far."""
        self._model = model
        self._device = device_of(model)
        self._every_n_steps = settings.every_n_steps
        self._optimizer = optimizer
        self._record = recorded and recorded.record
        self._recorder = Recorder(settings, recorded and recorded.store)
        self._features: TrainingFeatures | None = None
        self._evaluate: Callable[[], None] | None = None
        self._measured_at: int | None = None
        self._heartbeat = time.monotonic()

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the last measurement that is solved."""
        return self._recorder.latest

    @property
    def val_loss(self) -> float | None:
        """The last validation loss; None where the held-out batches give none."""
        return self._recorder.val_loss

    def step(self, loss: Tensor | float | None = None, n_targets: int | None = None) -> None:
        """To be called once after each step of the optimizer (and of the schedule).

        Args:
            loss: the mean loss of the step's targets, over its micro-batches; of this process.
            n_targets: how many they are, such as tokens: `tokens_seen` is their sum, 0 without.

        Raises:
            ConfigError: for one of both without the other.
            MeasurementError: where the features that were due did not come, or are not what they
                are described as.
        """
        require(
            (loss is None) == (n_targets is None),
            "step takes a mean loss and the number of targets that it is a mean of, or neither; "
            f"got loss={loss!r}, n_targets={n_targets!r}.",
        )
        recorder = self._recorder
        if loss is not None and n_targets is not None:
            mean = torch.as_tensor(loss, device=self._device).detach()
            recorder.add_training(mean, int(n_targets))
        if recorder.is_due and self._features is not None:
            self._features.require_seen(self.n_steps)
            recorder.finish(of_all=n_processes() > 1)
        self.n_steps += 1
        recorder.write_solved()
        if self.n_steps % self._every_n_steps == 0:
            self._measure()
        if self._record is not None:
            self._record.step = self.n_steps
            if time.monotonic() - self._heartbeat >= HEARTBEAT_S:
                self._heartbeat = time.monotonic()
                self._record.update()  # every update is a heartbeat

    def state_dict(self) -> dict[str, Any]:
        """What belongs into a checkpoint of the step that was just told; `resume=` takes it.

        Rows up to that step are then written. All processes must call it.
        """
        state = self._recorder.state_dict()
        return {**state, "n_steps": self.n_steps, "measured_at": self._measured_at}

    # What `watch` does around the loop

    def _begin(
        self,
        ffns: Sequence[FFN],
        choose: Callable[..., Choice],
        batches: Sequence[Any] | None,
        forward: Forward,
        state: Mapping[str, Any] | None,
        token_counts: Tensor | None,
    ) -> None:
        n, inner = n_processes(), unwrapped(self._model)
        self._recorder.open(
            ffns,
            self._device,
            anew=state is None,
            rank=rank(),
            n_processes=n,
            n_here=int(os.environ.get("LOCAL_WORLD_SIZE", n)),
            token_counts=token_counts,
            find_streams=None
            if batches is None
            else partial(_streams, inner, ffns, batches[0], forward),
        )
        recorder = self._recorder

        def run(batch: Any) -> object:
            with evaluating(inner):
                return call_probed(recorder.probe, forward, inner, batch)

        choice = choose(inner, recorder.probe, run)
        if batches is None:
            self._features = TrainingFeatures(self._model, recorder, choice)
        else:
            self._evaluate = partial(evaluate, inner, batches, forward, recorder, choice)
        if state is not None:
            self._recorder.load_state_dict(state)
            self.n_steps, self._measured_at = state["n_steps"], state["measured_at"]
        self._recorder.drop_after(self.n_steps if state is not None else -1)
        if self._record is not None:
            self._record.step = self.n_steps
        if state is None:
            self._measure()

    def _measure(self) -> None:
        """Labels the present weights; measures them, or has what follows measured."""
        is_split = n_processes() > 1
        self._recorder.start_validation(is_split=is_split)
        if self._evaluate is not None:
            self._evaluate()
        self._recorder.label(self.n_steps, _rate(self._optimizer))
        if self._evaluate is not None:
            self._recorder.finish(of_all=is_split)
        self._recorder.end_validation()
        self._measured_at = self.n_steps

    def _end(self) -> None:
        if self._evaluate is not None and self._measured_at != self.n_steps:
            self._measure()
        self._recorder.drop_due()
        self._recorder.wait()
        if self._record is not None:
            self._record.final = {
                "val_loss": self.val_loss,
                "measuring_seconds": self._recorder.seconds,
            }

    def _abort(self) -> None:
        self._recorder.abort()
        if n_processes() == 1:  # else the others may never come to exchange their spectra
            self._recorder.drain()

    def _close(self) -> None:
        if self._features is not None:
            self._features.close()
        self._recorder.close()


def _streams(
    model: nn.Module, ffns: Sequence[FFN], batch: Any, forward: Forward
) -> list[Stream | None]:
    with evaluating(model):
        return find_streams(model, ffns, lambda: forward(model, batch))


def _rate(optimizer: Optimizer | None) -> float | None:
    """The learning rate of all groups of an optimizer, as the schedule left it; None where they
    have several."""
    rates = {float(group["lr"]) for group in optimizer.param_groups} if optimizer else set()
    return rates.pop() if len(rates) == 1 else None
