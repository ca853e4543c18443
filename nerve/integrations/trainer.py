"""`nerve.SpectralCallback`: measures a model while the Hugging Face Trainer trains it."""

import json
import logging
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nerve.config import from_mapping
from nerve.errors import MeasurementError, StoreError, noted
from nerve.files import write_atomically
from nerve.integrations.loop import WatchedLoop
from nerve.integrations.losses import StepLosses
from nerve.integrations.watch import watched
from nerve.measuring.distributed import gathered, n_processes, rank
from nerve.measuring.ffns import FFN
from nerve.measuring.masks import Masks
from nerve.recording.means import monitored_values
from nerve.recording.settings import MonitorSettings
from nerve.storage.directory import RunDirectory

log = logging.getLogger(__name__)


class SpectralCallback(TrainerCallback):
    """Measures a model's FFNs at steps 0, k, 2k, … of a Trainer, and records the run.

    ```
    spectra = nerve.SpectralCallback("outputs/mine", every_n_steps=100)
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[spectra]).train()
    ```

    A row labeled step s holds the features computed with the weights after s updates. With
    `source="train"` they are those of the update that follows, with all its micro-batches, in train
    mode; `val_loss` is there where the Trainer evaluates at s. With `source="heldout"` they are
    those of its evaluation, in eval mode: the Trainer is asked to evaluate at the steps that are
    measured and at the last one, beside its own evaluations, which schedules and rules on results
    see as any other. Of several evaluation sets the first is measured. Measuring draws no random
    numbers and leaves weights, gradients and modes as they are.

    `train_loss` is the model's own loss, as the Trainer has it, and null where the loss is computed
    outside the model. `tokens_seen` is the sum of the targets that the Trainer counts; 0 for a
    model that does not take their number. Callbacks behind this one, and `metric_for_best_model`,
    find what was measured among the metrics of an evaluation, as `eval_ffn/03/pr_post`.

    The run is done where training ends. `resume_from_checkpoint` goes on with it, from whatever
    checkpoint the Trainer has saved. The Trainer tells nobody of an exception: what was measured is
    stored by then, and the run has failed when the program ends, or training begins anew.

    Args:
        directory: the run directory.
        every_n_steps: updates from one measurement to the next; None where `steps` says all.
        source: `train` or `heldout`.
        config, mask, exclude, only_labeled, ffns: as `nerve.watch` takes them.
        settings: `steps`, `spectra`, `layers`, `shortcut`, `skip_first`, as there.

    Raises:
        ConfigError: for a setting that is out of range.

    As training begins it raises what `nerve.watch` raises.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_steps: int | None = 100,
        source: str = "train",
        config: Mapping[str, Any] | None = None,
        mask: Callable[[Any], Masks] | None = None,
        exclude: Collection[int] = (),
        only_labeled: bool = False,
        ffns: Sequence[FFN] | None = None,
        **settings: Any,
    ) -> None:
        self._settings = {**settings, "every_n_steps": every_n_steps, "source": source}
        from_mapping(MonitorSettings, self._settings, "monitor")
        self._run = RunDirectory(directory)
        self._how = {
            "config": config,
            "mask": mask,
            "exclude": exclude,
            "only_labeled": only_labeled,
            "ffns": ffns,
        }
        self._opened = _Opened()
        self._losses: StepLosses | None = None
        self._evaluates_at_start = False
        # The Trainer tells no callback of an exception.
        weakref.finalize(self, _Opened.give_up, self._opened)

    @property
    def latest(self) -> list[dict[str, Any]]:
        """The rows of the last measurement that is solved."""
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
        self._opened.give_up()
        step = state.global_step
        saved = self._saved(step)
        loop = self._opened.open(
            watched(
                model,
                self._run.path,
                self._settings,
                **self._how,  # type: ignore[arg-type]
                optimizer=optimizer,
                batches=None,
                forward=None,
                resume=saved,
                first=step,
                last_step=state.max_steps,
            )
        )
        self._losses = StepLosses(model, of_all=args.average_tokens_across_devices)
        self._opened.losses = self._losses
        self._evaluates_at_start = args.eval_on_start
        args.eval_on_start = args.eval_on_start or loop.awaits_evaluation

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **others: Any,
    ) -> None:
        with self._watching() as loop:
            assert self._losses is not None
            self._losses.give(loop.recorder)
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
        metrics = {} if metrics is None else metrics
        args.eval_on_start = self._evaluates_at_start
        with self._watching() as loop:
            if loop.awaits_evaluation:
                assert loop.features is not None
                require_once(loop.features.n_sequences, eval_dataloader)
                loop.end_evaluation(_loss_of(metrics))
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
            saved = loop.state_dict()
            if rank() == 0:
                path = self._state_path(state.global_step)
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, lambda file: file.write(json.dumps(saved).encode()))

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
        """The loop; what is raised ends the run."""
        loop = self._opened.loop
        assert loop is not None, "a Trainer begins with on_train_begin"
        try:
            yield loop
        except BaseException as error:
            with noted(error):
                self._opened.close(error)
            raise

    # The state of each checkpoint of the Trainer, which says only to which step it has come

    def _saved(self, step: int) -> dict[str, Any] | None:
        """What was kept with the Trainer's checkpoint of that step; in every process.

        Raises:
            StoreError: where the run has come further without one.
        """
        found: tuple[dict[str, Any] | None, str | None] | None = None
        if rank() == 0:
            found = self._found(step)
        saved, refused = gathered(found)[0]
        if refused is not None:
            raise StoreError(refused)
        return saved

    def _found(self, step: int) -> tuple[dict[str, Any] | None, str | None]:
        if step == 0:
            return None, None
        path = self._state_path(step)
        if path.is_file():
            return json.loads(path.read_text()), None
        if self._run.record is None:
            log.warning(
                "the run in %s begins at step %d of the Trainer; tokens_seen counts from there",
                self._run.path,
                step,
            )
            return None, None
        there = sorted(int(each.stem.partition("-")[2]) for each in path.parent.glob("trainer-*"))
        return None, (
            f"A run goes on from a checkpoint that the Trainer saved while it was measured; "
            f"{self._run.path} has the state of steps {', '.join(map(str, there)) or 'none'}, and "
            f"the Trainer resumes at step {step}. Resume from one of these, or record in another "
            "directory."
        )

    def _state_path(self, step: int) -> Any:
        return self._run.path / "checkpoints" / f"trainer-{step}.json"


class _Opened:
    """The run that is open, apart from the callback, so that it can be closed without it."""

    def __init__(self) -> None:
        self.loop: WatchedLoop | None = None
        self.losses: StepLosses | None = None
        self._context: AbstractContextManager[WatchedLoop] | None = None

    def open(self, context: AbstractContextManager[WatchedLoop]) -> WatchedLoop:
        """Enters what records the run."""
        self.loop = context.__enter__()
        self._context = context
        return self.loop

    def close(self, error: BaseException | None) -> None:
        """Ends the run: done, or as the error says."""
        context, self._context, self.loop = self._context, None, None
        if self.losses is not None:
            self.losses.close()
            self.losses = None
        if context is None:
            return
        if error is None:
            context.__exit__(None, None, None)
        else:
            context.__exit__(type(error), error, error.__traceback__)

    def give_up(self) -> None:
        """Ends a run whose training did not come to its end, with the error that ended the program
        where that is known."""
        if self._context is not None:
            last = getattr(sys, "last_value", None)
            error = last or RuntimeError("Training ended before its last step, by an exception.")
            with noted(error):
                self.close(error)


def require_once(n_sequences: int, loader: Any) -> None:
    """Raises `MeasurementError` where several processes have evaluated some sequences twice.

    Args:
        n_sequences: how many this process has evaluated.
        loader: the evaluation loader.
    """
    dataset = getattr(loader, "dataset", None)
    if n_processes() == 1 or not isinstance(dataset, Sized):
        return
    total = sum(gathered(n_sequences))
    if total > len(dataset):
        raise MeasurementError(
            f"Each held-out sequence counts once; {n_processes()} processes have evaluated {total} "
            f"of an eval_dataset of {len(dataset)}, as the Trainer fills up the last batches. Make "
            "its size a multiple of processes times per_device_eval_batch_size, or set "
            "accelerator_config={'even_batches': False}."
        )


def _loss_of(metrics: Mapping[str, float]) -> float | None:
    """The loss of an evaluation, whatever the evaluation set is called."""
    suffix = "_runtime"
    prefix = next((name.removesuffix(suffix) for name in metrics if name.endswith(suffix)), "eval")
    return metrics.get(f"{prefix}_loss")
