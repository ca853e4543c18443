"""`nerve.SpectralCallback`: measures a model while the Hugging Face Trainer trains it."""

import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nerve.errors import MeasurementError, noted
from nerve.integrations.callers import (
    adapters_of,
    ends_evaluation_of_trainer,
    is_of_evaluation,
    is_of_training,
)
from nerve.integrations.loop import WatchedLoop
from nerve.integrations.losses import StepLosses
from nerve.integrations.open_run import OpenRun
from nerve.integrations.trainer_states import TrainerStates
from nerve.integrations.watch import watched
from nerve.measuring.ffns import FFN
from nerve.measuring.given import check_given, explicit
from nerve.measuring.masks import Masks
from nerve.measuring.messages import gathered
from nerve.measuring.processes import n_processes
from nerve.recording.given import check_token_counts, watched_config
from nerve.recording.settings import MonitorSettings
from nerve.recording.writer import is_measured, monitored_values
from nerve.storage.directory import RunDirectory


class SpectralCallback(TrainerCallback):
    """Measures a model's FFNs at steps 0, k, 2k, … of a Trainer, and records the run.

    ```
    spectra = nerve.SpectralCallback("outputs/mine", every_n_steps=100)
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[spectra]).train()
    ```

    A row with step s holds the features computed with the weights after s updates. With
    `source="train"` these are the features of the next update, with all its micro-batches, in train
    mode; `val_loss` is set where the Trainer evaluates at s. With `source="heldout"` they are those
    of the Trainer's evaluation, in eval mode: an evaluation is requested at every measured step and
    at the last one, in addition to the Trainer's own. Schedulers and callbacks that use evaluation
    results see these like any other evaluation. Of several evaluation sets, the first is measured.
    Evaluations that other callbacks start are not measured, and their loss is not `val_loss`; nor
    are passes with other adapters of PEFT than at the beginning, such as those of a reference.
    Measuring draws no random numbers and leaves weights, gradients and modes unchanged.

    `train_loss` is the model's own loss as reported by the Trainer, and null if the loss is
    computed outside the model. `tokens_seen` is the sum of the targets that the Trainer counts; 0
    for a model that does not accept their number.

    With `source="heldout"`, callbacks after this one, and `metric_for_best_model`, find the results
    among the metrics of an evaluation, as `eval_ffn/03/pr_post`. They are those of the latest
    measurement that is solved: of the same step on a CPU, up to four measurements old on a GPU. If
    `metric_for_best_model` is one of them, training waits for those of the same step.

    The run is done when training ends. `resume_from_checkpoint` continues it from any checkpoint
    that the Trainer has saved. The Trainer does not report exceptions to its callbacks: everything
    measured is stored by then, and the run is marked as failed when the program ends or training
    starts again.

    Args:
        directory: the run directory.
        every_n_steps, steps: as in `nerve.watch`; the Trainer says which step is the last.
        source: `train` or `heldout`; the default needs no evaluation, which takes time and requires
            an eval_dataset.
        token_counts: as in `nerve.watch`; groups by frequency require it.
        others: as in `nerve.watch`; a residual stream that the model does not declare is not looked
            for.

    Raises:
        ConfigError: for a setting that is out of range, or an argument of the wrong kind.
        StoreError: if the directory holds something that is not the record of a run.

    When training begins, it raises the errors of `nerve.watch`.
    """

    @explicit(
        heldout='Give source="heldout", and the Trainer an eval_dataset.',
        select="Give ffns=nerve.find_ffns(model, batch, select=…).",
        labels="Give config=, which distinguishes your runs.",
        **dict.fromkeys(("optimizer", "forward", "resume", "last_step"), "The Trainer has it."),
    )
    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_steps: int | None = MonitorSettings.every_n_steps,
        steps: Sequence[int] | str | None = None,
        source: str = "train",
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
        token_counts: Tensor | None = None,
    ) -> None:
        self._settings = MonitorSettings.of(
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
        check_given(ffns=ffns, mask=mask, exclude=exclude, layers=layers)
        check_token_counts(groups, token_counts, are_counted=False)
        self._config = watched_config(
            directory,
            config,
            self._settings,
            fingerprints=fingerprints,
            mask=mask,
            exclude=exclude,
            only_labeled=only_labeled,
            ffns=ffns,
            token_counts=token_counts,
        )
        self._run = RunDirectory(directory)
        self._how: dict[str, Any] = {
            "mask": mask,
            "ffns": ffns,
            "token_counts": token_counts,
            "fingerprints": fingerprints,
        }
        self._opened = OpenRun()
        self._states = TrainerStates(self._run)
        # The Trainer does not notify callbacks of exceptions.
        weakref.finalize(self, OpenRun.give_up, self._opened)

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the most recent measurement whose spectra are available."""
        loop = self._opened.loop
        return loop.latest if loop else []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **others: Any,
    ) -> None:
        assert model is not None
        step = state.global_step
        OpenRun.give_up_in(self._run.path)
        saved = self._states.load(step)
        loop = self._opened.open(
            self._run.path,
            watched(
                model,
                self._run.path,
                self._settings,
                self._config,
                **self._how,
                optimizer=optimizer,
                batches=None,
                forward=None,
                resume=saved,
                first=step,
                last_step=state.max_steps,
                how_to_resume="resume_from_checkpoint",
            ),
        )
        if loop.features is not None:
            is_of_loop = is_of_training if self._settings.source == "train" else is_of_evaluation
            trained, adapters = weakref.ref(model), adapters_of(model)

            def is_of_model() -> bool:
                own = trained()
                return is_of_loop() and own is not None and adapters_of(own) == adapters

            loop.features.is_of_loop = is_of_model
        losses = StepLosses(model, of_all=args.average_tokens_across_devices)
        self._opened.losses = losses
        self._opened.restore = partial(setattr, args, "eval_on_start", args.eval_on_start)
        args.eval_on_start = args.eval_on_start or loop.awaits_evaluation

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        with self._watching() as loop:
            assert self._opened.losses is not None
            self._opened.losses.give(loop.recorder)
            loop.end_step()
            if state.global_step >= state.max_steps or control.should_training_stop:
                loop.measure_last()
            if loop.awaits_evaluation:
                control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        eval_dataloader: DataLoader[Any] | None = None,
        **others: Any,
    ) -> None:
        if self._opened.loop is None:  # not in training
            return
        if not ends_evaluation_of_trainer():
            # The callback handler regards it as the requested one.
            control.should_evaluate |= self._opened.loop.awaits_evaluation
            return
        metrics = {} if metrics is None else metrics
        self._opened.restore()
        with self._watching() as loop:
            if loop.awaits_evaluation:
                assert loop.features is not None
                require_once(loop.features.n_sequences, eval_dataloader)
                loop.end_evaluation(_loss_of(metrics))
                if is_measured((args.metric_for_best_model or "").removeprefix("eval_")):
                    loop.recorder.wait()  # the deciding value must be of this step
                values = gathered(monitored_values(loop.latest))[0]
                metrics |= {f"eval_{name}": value for name, value in values.items()}
            elif loop.recorder.due_step == state.global_step:
                loss = _loss_of(metrics)
                if loss is not None:
                    loop.recorder.note_validation(loss)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        with self._watching() as loop:
            self._states.save(state.global_step, loop.state_dict())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        self._opened.close(None)

    @contextmanager
    def _watching(self) -> Iterator[WatchedLoop]:
        """The loop; an exception ends the run."""
        loop = self._opened.loop
        assert loop is not None, "a Trainer begins with on_train_begin"
        try:
            yield loop
        except BaseException as error:
            with noted(error):
                self._opened.close(error)
            raise


def require_once(n_sequences: int, loader: Any) -> None:
    """Raises `MeasurementError` if several processes may have evaluated some sequences twice.

    An example may be several sequences, such as a chosen and a rejected answer.

    Args:
        n_sequences: number of sequences that this process has evaluated.
        loader: the evaluation loader.
    """
    dataset = getattr(loader, "dataset", None)
    if n_processes() == 1 or not isinstance(dataset, Sized):
        return
    total = sum(gathered(n_sequences))
    if total > len(dataset) and _fills_up(loader, len(dataset)):
        raise MeasurementError(
            f"Each held-out sequence must be evaluated once; {n_processes()} processes have "
            f"evaluated {total} for an eval_dataset of {len(dataset)}, since the Trainer fills up "
            "the last batches. Make its size a multiple of processes times "
            "per_device_eval_batch_size, or set accelerator_config={'even_batches': False}."
        )


def _fills_up(loader: Any, n_examples: int) -> bool:
    """Whether a loader of accelerate fills up its last batches with examples of the first ones, so
    that all processes get as many; True for any other loader."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None)
    if size is None or not hasattr(sampler, "even_batches"):
        return True
    of_all = size if sampler.split_batches else size * sampler.num_processes
    return bool(sampler.even_batches) and n_examples % of_all != 0


def _loss_of(metrics: Mapping[str, float]) -> float | None:
    """The loss of an evaluation, whatever the name of the evaluation set."""
    suffix = "_runtime"
    prefix = next((name.removesuffix(suffix) for name in metrics if name.endswith(suffix)), "eval")
    return metrics.get(f"{prefix}_loss")
