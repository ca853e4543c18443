"""When a run saves, and that the best weights have the lowest validation loss."""

import time
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from support import Batches, KeepWeights
from torch import nn
from torch.optim import SGD

from nerve.errors import ConfigError, StoreError
from nerve.optim import Schedule
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training import agreement
from nerve.training.checkpoint_callback import Checkpointing
from nerve.training.checkpoint_files import (
    read_checkpoint,
)
from nerve.training.checkpoint_io import CheckpointCadence, CheckpointFiles, require_other_files
from nerve.training.module import ImageClassifier
from nerve.training.signals import StopSignals

N_STEPS = 8


def averaging() -> L.Callback:
    """Weight averaging, which the oldest supported version of Lightning does not have."""
    make = getattr(L.pytorch.callbacks, "EMAWeightAveraging", None)
    if make is None:
        pytest.skip("this Lightning averages no weights")
    return make(decay=0.9)


class Scripted(ImageClassifier):
    """Has the given validation losses from step 1 on, or without any, its real ones."""

    losses: tuple[float, ...] = ()

    def validation_step(self, batch, batch_idx):
        if not self.losses:
            return super().validation_step(batch, batch_idx)
        return self.log("val_loss", self.losses[self.global_step - 1], batch_size=1)


def batches(n: int) -> Batches:
    generator = torch.Generator().manual_seed(0)
    return Batches(
        (torch.randn(3, 4, generator=generator), torch.randint(2, (3,), generator=generator))
        for _ in range(n)
    )


def fit(
    directory,
    cadence: CheckpointCadence,
    losses: tuple[float, ...],
    *,
    accumulate: int = 1,
    validate_every: int = 1,
    callbacks: tuple[L.Callback, ...] = (),
):
    """Trains `N_STEPS` steps and validates at the given interval; returns the weights after each
    step."""
    torch.manual_seed(0)
    module = Scripted(
        nn.Linear(4, 2), lambda model: SGD(model.parameters(), lr=0.1), Schedule("linear")
    )
    module.losses = losses
    RunRecord.create(directory, {})
    files, kept = CheckpointFiles(), KeepWeights()
    with StopSignals() as signals:
        saving = Checkpointing(
            files,
            RunDirectory(directory),
            cadence,
            signals,
            RunStore(directory, "run"),
        )
        saving.data_dims = {"vocab_size": 7}
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=N_STEPS,
            max_epochs=-1,
            accumulate_grad_batches=accumulate,
            val_check_interval=accumulate * validate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[kept, StopAtTheEnd(), saving, *callbacks],
            plugins=[files],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, batches(N_STEPS * accumulate), batches(1))
    return kept.after, saving


class StopAtTheEnd(L.Callback):
    """Sets should_stop like the monitor, so that the last step is validated."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == trainer.max_steps


@pytest.fixture
def steps_saved(monkeypatch) -> list[int]:
    """The step of each checkpoint that was written, in order."""
    steps: list[int] = []
    write = CheckpointFiles.write

    def noting(files):
        if files.holds:
            steps.extend(held["global_step"] for held in files._held.values())
        write(files)

    monkeypatch.setattr(CheckpointFiles, "write", noting)
    return steps


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(("every", "expected"), [(None, [8]), (3, [3, 6, 8]), (1, range(1, 9))])
def test_a_checkpoint_is_written_every_so_many_steps_and_at_the_end(
    tmp_path, steps_saved, accumulate, every, expected
):
    fit(tmp_path, CheckpointCadence(every_n_steps=every), (1.0,) * N_STEPS, accumulate=accumulate)
    assert steps_saved == list(expected)
    assert read_checkpoint(RunDirectory(tmp_path).checkpoint("last"))["global_step"] == N_STEPS


def test_a_checkpoint_is_due_at_steps_and_so_many_minutes_after_the_last_one():
    both = CheckpointCadence(every_n_steps=5, every_n_minutes=2)
    assert [step for step in range(1, 12) if both.is_due_at(step)] == [5, 10]
    assert [seconds for seconds in (0, 119, 120, 130) if both.is_due_after(seconds)] == [120, 130]
    neither = CheckpointCadence()
    assert not neither.is_due_at(1000)
    assert not neither.is_due_after(1e9)


def test_minutes_are_counted_from_the_last_checkpoint(tmp_path, steps_saved, monkeypatch):
    """The clock advances by 25 s per call: once per step, and once per checkpoint."""
    seconds = iter(range(0, 10**6, 25))
    clock = SimpleNamespace(monotonic=partial(next, seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr("nerve.training.checkpoint_callback.time", clock)
    fit(tmp_path, CheckpointCadence(every_n_minutes=1), (1.0,) * N_STEPS)
    assert steps_saved == [3, 6, N_STEPS]


def test_the_time_of_training_begins_with_the_fit(tmp_path, monkeypatch):
    """What is prepared before, such as a corpus that is tokenized for the first time, may take
    longer."""
    now = [0.0]
    clock = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: now[0])
    monkeypatch.setattr("nerve.training.checkpoint_callback.time", clock)

    made = Checkpointing.__init__

    def make(*args):
        made(*args)
        now[0] += 1000

    class Slow(L.Callback):
        def on_train_batch_end(self, *args):
            now[0] += 1

    monkeypatch.setattr(Checkpointing, "__init__", make)
    _, saving = fit(tmp_path, CheckpointCadence(), (1.0,) * N_STEPS, callbacks=(Slow(),))
    assert saving.seconds == N_STEPS


@pytest.mark.parametrize("every", [None, 3])
def test_steps_of_several_processes_wait_for_no_device_and_seldom_for_each_other(
    tmp_path, steps_saved, monkeypatch, every
):
    """The steps at which to save are known without an exchange; of eight fast steps, only the first
    has one."""
    collectives, exchanges = [], []
    for name in ("all_reduce", "all_gather", "broadcast", "reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, name, partial(collectives.append, name))

    def gathered(value):
        exchanges.append(value)
        return [value, value]

    monkeypatch.setattr(agreement, "n_processes", lambda: 2)
    monkeypatch.setattr(agreement, "gathered", gathered)
    fit(tmp_path, CheckpointCadence(every_n_steps=every), (1.0,) * N_STEPS)
    assert (collectives, [wish for wish, _ in exchanges]) == ([], [0])
    assert steps_saved == ([3, 6, 8] if every else [8])


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((8, 7, 6, 5, 4, 3, 2, 1), 8),
        ((1, 2, 3, 4, 5, 6, 7, 8), 1),
        ((5, 4, 2, 3, 2, 6, 7, 8), 3),
    ],
)
@pytest.mark.parametrize("every", [None, 1, 3])
def test_the_best_weights_are_those_of_the_lowest_validation_loss(tmp_path, losses, best, every):
    """Regardless of when files are written; of equal losses, the first counts."""
    weights, saving = fit(
        tmp_path, CheckpointCadence(every_n_steps=every), tuple(map(float, losses))
    )
    kept = read_checkpoint(RunDirectory(tmp_path).checkpoint("best"))
    assert (kept["step"], kept["val_loss"]) == (best, min(losses))
    assert kept["facts"] == {"vocab_size": 7}
    for name, weight in weights[best].items():
        assert torch.equal(kept["model"][name], weight)
    assert saving.scores == {"val_loss": losses[-1]}


def test_where_weights_are_averaged_the_best_ones_have_the_loss_that_they_are_kept_for(tmp_path):
    """The averaged weights are validated, not the trained ones, whose loss differs."""
    weights, _ = fit(tmp_path, CheckpointCadence(), (), callbacks=(averaging(),))
    kept = read_checkpoint(RunDirectory(tmp_path).checkpoint("best"))

    def loss(state: dict[str, torch.Tensor]) -> float:
        model = nn.Linear(4, 2)
        model.load_state_dict(state)
        ((images, labels),) = batches(1)
        return nn.functional.cross_entropy(model(images), labels).item()

    assert loss(kept["model"]) == pytest.approx(kept["val_loss"], rel=1e-6)
    assert loss(weights[kept["step"]]) != pytest.approx(kept["val_loss"], rel=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("validate_every", [1, 3, N_STEPS])
def test_kept_weights_are_those_after_exactly_so_many_steps(tmp_path, accumulate, validate_every):
    """At the start, in the middle and at the end of training, with or without a validation at the
    step."""
    weights, _ = fit(
        tmp_path,
        CheckpointCadence(keep=[0, 2, 3, N_STEPS]),
        (1.0,) * N_STEPS,
        accumulate=accumulate,
        validate_every=validate_every,
    )
    assert RunDirectory(tmp_path).kept_steps() == [0, 2, 3, N_STEPS]
    for step in RunDirectory(tmp_path).kept_steps():
        kept = read_checkpoint(RunDirectory(tmp_path).kept_checkpoint(step))
        assert set(kept) == {"model", "facts", "step", "run_id", "config_id", "config"}
        assert (kept["step"], kept["facts"]) == (step, {"vocab_size": 7})
        for name, weight in weights[step].items():
            assert torch.equal(kept["model"][name], weight)
    assert not torch.equal(weights[2]["weight"], weights[3]["weight"])


def test_weights_are_gathered_for_the_steps_to_keep_alone(tmp_path, monkeypatch):
    """Apart from the best weights, which are gathered once here, because the losses are equal."""
    steps, gather = [], Checkpointing._weights

    def noting(saving, trainer, module):
        steps.append(trainer.global_step)
        return gather(saving, trainer, module)

    monkeypatch.setattr(Checkpointing, "_weights", noting)
    fit(tmp_path, CheckpointCadence(keep=[5]), (1.0,) * N_STEPS)
    assert steps == [1, 5]


def test_where_weights_are_averaged_the_kept_ones_are_the_averages_as_the_best_are(tmp_path):
    """At the same step, the best and the kept weights are equal, and differ from the trained
    ones."""
    losses = (2.0, 2.0, 1.0, *(2.0,) * (N_STEPS - 3))
    average = averaging()
    weights, _ = fit(tmp_path, CheckpointCadence(keep=[3]), losses, callbacks=(average,))
    best = read_checkpoint(RunDirectory(tmp_path).checkpoint("best"))
    kept = read_checkpoint(RunDirectory(tmp_path).kept_checkpoint(3))
    assert best["step"] == 3
    for name, weight in best["model"].items():
        assert torch.equal(kept["model"][name], weight)
        assert not torch.equal(kept["model"][name], weights[3][name])


@pytest.mark.parametrize("keep", [[-1], [1.5], [True], ["3"], [None], "3", 3, None])
def test_steps_to_keep_are_checked(keep):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep must be a list of optimizer steps"):
        CheckpointCadence(keep=keep)


def test_steps_to_keep_are_those_of_the_run():
    CheckpointCadence(keep=[0, 8]).require_reached(8)
    with pytest.raises(ConfigError, match=r"got 9, 20 with trainer\.max_steps=8"):
        CheckpointCadence(keep=[0, 9, 8, 20]).require_reached(8)


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_one_before(
    tmp_path, monkeypatch
):
    path = RunDirectory(tmp_path).checkpoint("last")
    calls = []

    def refuse(target, content):
        calls.append(target)
        if len(calls) > 2:  # best and last of step 2 were written
            raise StoreError("full")
        torch.save(dict(content), target)

    path.parent.mkdir()
    monkeypatch.setattr("nerve.training.checkpoint_io.write_checkpoint", refuse)
    monkeypatch.setattr("nerve.training.checkpoint_callback.write_checkpoint", refuse)
    with pytest.raises(StoreError, match="full"):
        fit(
            tmp_path,
            CheckpointCadence(every_n_steps=2),
            tuple(float(9 - i) for i in range(N_STEPS)),
        )
    assert read_checkpoint(path)["global_step"] == 2


@pytest.mark.parametrize(
    "values",
    [
        {"every_n_steps": 0},
        {"every_n_steps": 1.5},
        {"every_n_minutes": 0},
        {"every_n_minutes": "x"},
    ],
)
def test_a_cadence_is_checked(values):
    with pytest.raises(ConfigError, match=rf"checkpoint\.{next(iter(values))}"):
        CheckpointCadence(**values)


class Rename(L.Callback):
    """Renames the run directory after three steps."""

    def __init__(self, directory) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            self.directory.rename(self.directory.with_name("moved"))


@pytest.mark.parametrize(
    "cadence",
    [CheckpointCadence(every_n_steps=2), CheckpointCadence(keep=[5]), CheckpointCadence()],
)
def test_a_directory_that_was_renamed_does_not_come_back_with_lone_checkpoints(tmp_path, cadence):
    directory = tmp_path / "run"
    with pytest.raises(StoreError, match="run no longer exists: it was renamed or deleted"):
        fit(directory, cadence, (1.0,) * N_STEPS, callbacks=(Rename(directory),))
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


class SaveOver(L.Callback):
    """Saves to an arbitrary path, like a user's code."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "step-000000000003.ckpt"])
def test_the_files_of_a_run_are_not_written_by_anything_else(tmp_path, name):
    """ModelCheckpoint(save_last=True) would overwrite the checkpoint from which the run resumes."""
    own = SaveOver(tmp_path / "checkpoints" / name)
    with pytest.raises(ConfigError, match=rf"{name} is one of them, .* another name or dirpath"):
        fit(tmp_path, CheckpointCadence(every_n_steps=1), (1.0,) * N_STEPS, callbacks=(own,))
    assert not own.path.exists()


@pytest.mark.parametrize("where", ["checkpoints/mine.ckpt", "elsewhere/last.ckpt"])
def test_further_callbacks_may_save_to_other_files(tmp_path, where):
    fit(
        tmp_path,
        CheckpointCadence(),
        (1.0,) * N_STEPS,
        callbacks=(SaveOver(tmp_path / where),),
    )
    assert read_checkpoint(tmp_path / where)["global_step"] == N_STEPS
    assert read_checkpoint(RunDirectory(tmp_path).checkpoint("last"))["global_step"] == N_STEPS


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"save_last": True}, "last.ckpt"),
        ({"save_last": True, "save_weights_only": True}, "last.ckpt"),
        ({"filename": "best"}, "best.ckpt"),
        (
            {"filename": "step-{step:012d}", "auto_insert_metric_name": False},
            "step-000000000000.ckpt",
        ),
        ({"filename": "last", "dirpath": "checkpoints"}, "last.ckpt"),
    ],
)
def test_a_callback_that_would_write_them_is_refused_before_anything_is_done(
    tmp_path, monkeypatch, values, name
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is one of them"):
        require_other_files([ModelCheckpoint(**values)], RunDirectory(tmp_path))


@pytest.mark.parametrize(
    "values", [{}, {"save_last": True, "dirpath": "elsewhere"}, {"filename": "best-{step}"}]
)
def test_a_callback_that_writes_others_is_not(tmp_path, values):
    require_other_files([ModelCheckpoint(**values), L.Callback()], RunDirectory(tmp_path))
