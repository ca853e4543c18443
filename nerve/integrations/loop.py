"""The run of an external training loop: measures and records its steps."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nerve.config import require, require_count, require_type
from nerve.integrations.features import PassFeatures
from nerve.integrations.heldout import Forward, evaluate
from nerve.integrations.wrapping import device_of, unwrapped
from nerve.measuring.around import Stream, find_streams
from nerve.measuring.choice import Choice, call_probed
from nerve.measuring.ffns import FFN
from nerve.measuring.forward import call_as_taken, evaluating
from nerve.measuring.processes import n_processes, rank
from nerve.recording.recorder import Recorder
from nerve.recording.run import RecordedRun
from nerve.recording.settings import MeasuredSteps, MonitorSettings

log = logging.getLogger(__name__)


class WatchedLoop:
    """The run of a training loop, as returned by `nerve.watch`."""

    def __init__(
        self,
        model: nn.Module,
        settings: MonitorSettings,
        steps: MeasuredSteps,
        optimizer: Optimizer | None,
        recorded: RecordedRun | None,
    ) -> None:
        self.n_steps = 0
        """Steps so far."""
        self.recorder = Recorder(settings, recorded and recorded.store)
        self.features: PassFeatures | None = None
        """Reads the features of passes that the loop runs; None if there are held-out batches."""
        self.awaits_evaluation = False
        """Whether the current step is measured by an evaluation that is still to come."""
        self._device = device_of(model)
        self._steps = steps
        self._is_train = settings.source == "train"
        self._optimizer = optimizer
        self._recorded = recorded
        self._evaluate: Callable[[], None] | None = None
        self._measured_at: int | None = None
        self._has_ended = False

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the most recent measurement whose spectra are available."""
        return self.recorder.latest

    @property
    def val_loss(self) -> float | None:
        """The last validation loss; None if the held-out batches give none."""
        return self.recorder.val_loss

    def step(self, loss: Tensor | float | None = None, n_targets: int | None = None) -> None:
        """Must be called once after each step of the optimizer (and of the learning rate schedule).

        Args:
            loss: the mean loss over the targets of the step and its micro-batches, on this process.
            n_targets: the number of these targets, such as tokens; `tokens_seen` is their sum.
                Without it, all steps have the same weight and `tokens_seen` is 0.

        Raises:
            ConfigError: for a loss that is not a number, an invalid number of targets or one
                without a loss; and after the run has ended.
            MeasurementError: if the features of a measured step are missing or do not match their
                description.
        """
        require(
            not self._has_ended,
            "step must be called inside the block of nerve.watch; it was called after its end, "
            f"at step {self.n_steps}. Move the loop into the block.",
        )
        require(
            loss is not None or n_targets is None,
            "step takes a mean loss and its number of targets, the loss alone, or neither; got "
            f"loss=None, n_targets={n_targets!r}.",
        )
        if loss is not None:
            require_type("loss of step", loss, float, Tensor)
            mean = torch.as_tensor(loss, device=self._device).detach()
            require(
                mean.numel() == 1,
                f"loss of step must be a scalar mean; got a tensor of shape {tuple(mean.shape)}. "
                "Give loss.mean().",
            )
            self.recorder.add_training(mean, None if n_targets is None else _count_of(n_targets))
        self.end_step()

    def end_step(self) -> None:
        """Ends a step whose losses have been added; raises as `step`."""
        recorder = self.recorder
        if recorder.is_due and self.features is not None:
            self.features.require_seen(self.n_steps)
            recorder.finish(of_all=n_processes() > 1)
        self.n_steps += 1
        recorder.end_step()
        if self.n_steps in self._steps:
            self.measure()
        if self._recorded is not None:
            self._recorded.heartbeat.note_step(self.n_steps)

    def state_dict(self) -> dict[str, Any]:
        """The state for a checkpoint of the current step, to be passed as `resume=`.

        Writes all rows up to that step. All processes must call it.
        """
        state = self.recorder.state_dict()
        return {**state, "n_steps": self.n_steps, "measured_at": self._measured_at}

    # What is done around the loop

    def begin(
        self,
        model: nn.Module,
        ffns: Sequence[FFN],
        choose: Callable[..., Choice],
        batches: Sequence[Any] | None,
        forward: Forward,
        state: Mapping[str, Any] | None,
        first: int = 0,
        token_counts: Tensor | None = None,
    ) -> None:
        """Starts measuring, with the first step if it is to be measured.

        Args:
            model: the model that the loop calls.
            choose: creates the `Choice` from a model, a probe and a function that runs the model.
            batches: held-out batches; None for features of passes that the loop runs.
            state: the state of the checkpoint from which the loop resumes.
            first: the first step of a loop without `state`.
            token_counts: how often each token occurs, for groups by frequency.
        """
        n, inner, recorder = n_processes(), unwrapped(model), self.recorder
        self.recorder.open(
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

        runs = forward if batches is not None else call_as_taken

        def run(batch: Any) -> object:
            with evaluating(inner, recorder.probe):
                return call_probed(recorder.probe, runs, inner, batch)

        choice = choose(inner, recorder.probe, run)
        if batches is None:
            self.features = PassFeatures(model, recorder, choice, of_training=self._is_train)
        else:
            self._evaluate = partial(evaluate, inner, batches, forward, recorder, choice)
        if state is not None:
            self.recorder.load_state_dict(state)
            self.n_steps, self._measured_at = state["n_steps"], state["measured_at"]
            if self.features is not None:
                self.features.is_open = recorder.is_due
        else:
            self.n_steps = first
        self.recorder.drop_after(self.n_steps if state is not None else first - 1)
        if self._recorded is not None:
            # A resumed run still has the final values of the end that it abandons.
            self._recorded.record.update(step=self.n_steps, final={})
        if state is None and self.n_steps in self._steps:
            self.measure()

    def measure(self) -> None:
        """Labels the current weights and measures them, or lets the next passes be measured."""
        self.recorder.start_validation(is_split=n_processes() > 1)
        if self.features is not None:
            self.features.is_open = True
            if not self._is_train:
                self.awaits_evaluation = True
                return
        if self._evaluate is not None:
            self._evaluate()
        self._label()

    def measure_last(self) -> None:
        """Measures the current step on held-out batches, unless that is done or in progress."""
        if self._measured_at != self.n_steps and not (self._is_train or self.awaits_evaluation):
            self.measure()

    def end_evaluation(self, loss: float | None) -> None:
        """Ends the evaluation that a measured step has waited for, with its loss.

        Raises:
            MeasurementError: if there was no pass.
        """
        assert self.features is not None
        self.awaits_evaluation = False
        self.features.require_seen(self.n_steps)
        if loss is not None:
            self.recorder.add_validation(torch.tensor(loss, dtype=torch.float64), None)
        self._label()

    def _label(self) -> None:
        self.recorder.label(self.n_steps, [] if self._optimizer is None else [self._optimizer])
        if not self._is_train:
            self.recorder.finish(of_all=n_processes() > 1)
        self.recorder.end_validation()
        self._measured_at = self.n_steps

    def end(self) -> None:
        """Measures the last step on held-out batches, and writes everything that was measured."""
        if self._evaluate is not None:
            self.measure_last()
        self.recorder.drop_due()
        self.recorder.wait()
        if not (self.recorder.n_measured or self.latest) and rank() == 0:
            log.warning(
                "nothing was measured: "
                + (
                    f"none of the {self.n_steps} steps was due for a measurement"
                    if self.n_steps
                    else "step was not called, as it must be after each step of the optimizer"
                )
            )
        if self._recorded is not None:
            self._recorded.record.final = {
                "val_loss": self.val_loss,
                "measuring_seconds": self.recorder.seconds,
            }

    def fail(self, error: BaseException) -> None:
        """Stops measuring at any point, and writes what was measured; an exception raised here is
        added to `error` as a note."""
        self.recorder.fail(error)

    def close(self) -> None:
        """Removes the hooks from the model and drops the references to it."""
        self._has_ended = True
        if self.features is not None:
            self.features.close()
        self.recorder.close()
        self.features = self._evaluate = self._optimizer = None


def _count_of(n_targets: Any) -> int:
    """The number of targets, which may be given as a tensor."""
    value = n_targets.item() if isinstance(n_targets, Tensor) else n_targets
    is_whole = isinstance(value, float) and value.is_integer()
    count = int(value) if is_whole else value
    require_count("n_targets of step", count, least=0)
    return int(count)


def _streams(
    model: nn.Module, ffns: Sequence[FFN], batch: Any, forward: Forward
) -> list[Stream | None]:
    with evaluating(model):
        return find_streams(model, ffns, lambda: forward(model, batch))
