"""A fit of Lightning is recorded as one run, from its beginning to its end, however it ends."""

import gc
import json
import signal
import time
import weakref
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from support import Batches
from torch import Tensor, nn

import nerve
from nerve.errors import ConfigError, StoreError
from nerve.recording import heartbeat
from nerve.storage.parts import list_parts
from nerve.storage.schema import DATASETS
from nerve.storage.state import RunIsBusyError, RunLock

N_STEPS = 6


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 4))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.model(batch) - 1).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Resumable(Batches):
    """Avoids Lightning's warning about a loader that cannot be resumed; all batches are alike."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class At(L.Callback):
    """Calls a function when a step begins."""

    def __init__(self, step: int, call) -> None:
        self.step, self.call = step, call

    def on_train_batch_start(self, trainer, *given) -> None:
        if trainer.global_step == self.step:
            self.call()


def trainer_of(*callbacks: L.Callback, max_steps: int = N_STEPS, **how) -> L.Trainer:
    return L.Trainer(
        **how,
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(
    directory: Path,
    *callbacks: L.Callback,
    module: L.LightningModule | None = None,
    ckpt_path: Path | None = None,
    **how,
) -> L.Trainer:
    """Trains and records every second step."""
    monitor = nerve.SpectralMonitor(directory, **{"every_n_steps": 2} | how)
    trainer = trainer_of(monitor, *callbacks)
    on(trainer, module or Module(), ckpt_path)
    return trainer


def on(trainer: L.Trainer, module: L.LightningModule, ckpt_path: Path | None = None) -> None:
    batch = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, Resumable([batch] * 3), Batches([batch]), ckpt_path=ckpt_path)


def raising(error: BaseException):
    def call() -> None:
        raise error

    return call


def record_of(directory: Path) -> nerve.RunRecord:
    RunLock(directory).release()  # it is free
    return nerve.RunRecord.load(directory)


def steps_of(directory: Path) -> list[int]:
    return nerve.load_metrics(directory)["step"].tolist()


def test_a_fit_is_a_run_of_its_configuration(tmp_path):
    config = {"design": "plain", "seed": 5}
    trainer = fit(tmp_path, config=config)
    record, monitor = record_of(tmp_path), trainer.callbacks[0]
    assert (record.run_status, record.step, record.seed) == ("done", N_STEPS, 5)
    assert (record.n_parameters, record.device) == (4 * 12 + 12 + 12 * 4 + 4, "cpu")
    assert record.config["design"] == "plain"
    assert record.config["monitor"]["every_n_steps"] == 2
    assert record.final == {"val_loss": monitor.val_loss, "measuring_seconds": monitor.seconds}
    assert steps_of(tmp_path) == [0, 2, 4, 6]
    assert [len(list_parts(tmp_path, DATASETS[name])) for name in ("metrics", "spectra")] == [1, 1]


def test_a_fit_that_early_stopping_ends_says_so(tmp_path):
    """So that it is not taken for a run that has reached its last step."""
    fit(tmp_path, EarlyStopping("pr_post", patience=1, mode="min", min_delta=1e3))
    record = record_of(tmp_path)
    assert (record.run_status, record.step) == ("done", 4)
    assert "pr_post" in record.stopped_by
    assert nerve.load_runs(tmp_path)["stopped_by"].notna().all()


def test_the_same_loop_watched_has_the_same_id(tmp_path):
    """Their configurations have the settings of the measurement in the same form."""
    fit(tmp_path / "fit", config={"design": "plain"}, source="train", skip_first=0)
    batch, module = torch.randn(9, 4), Module()
    with nerve.watch(
        module.model, tmp_path / "loop", every_n_steps=2, config={"design": "plain"}
    ) as run:
        module.training_step(batch, 0).backward()
        run.step()
    assert record_of(tmp_path / "loop").config_id == record_of(tmp_path / "fit").config_id


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [
        (ValueError("no"), ValueError, "failed"),
        (KeyboardInterrupt(), SystemExit, "interrupted"),  # Lightning makes one of the other
        (SystemExit(3), SystemExit, "interrupted"),
    ],
)
def test_a_fit_that_raises_is_recorded_and_continued_from_a_checkpoint(
    tmp_path, error, raised, status
):
    """With the same rows as a fit that nothing interrupted; nothing else continues it."""
    fit(tmp_path / "whole")
    cut, saved = tmp_path / "cut", tmp_path / "saved.ckpt"
    handler = signal.getsignal(signal.SIGINT)
    trainer = trainer_of(nerve.SpectralMonitor(cut, every_n_steps=2))
    trainer.callbacks += [
        At(3, lambda: trainer.save_checkpoint(saved)),
        At(5, raising(error)),
    ]
    with pytest.raises(raised):
        on(trainer, Module())
    signal.signal(signal.SIGINT, handler)  # which Lightning ignores from then on
    record = record_of(cut)
    assert (record.run_status, record.step) == (status, 5)
    assert record.error is not None
    assert record.error["type"] == type(error).__name__
    assert steps_of(cut) == [0, 2, 4]
    with pytest.raises(StoreError, match=r"with 3 measured steps\. .*trainer\.fit\(ckpt_path=…\)"):
        fit(cut)
    with pytest.raises(StoreError, match=r"other values of monitor\.skip_first"):
        fit(cut, skip_first=1, ckpt_path=saved)
    fit(cut, ckpt_path=saved)
    again = record_of(cut)
    assert (again.run_status, again.run_id, again.restarts) == ("done", record.run_id, 1)
    parts, whole = (nerve.load_metrics(tmp_path / name) for name in ("cut", "whole"))
    pd.testing.assert_frame_equal(parts.drop(columns="run_id"), whole.drop(columns="run_id"))


def test_a_run_that_is_done_goes_on_with_a_second_fit_of_its_trainer_only(tmp_path):
    module = Module()
    trainer = fit(tmp_path, module=module)
    with pytest.raises(StoreError, match="is done, with 4 measured steps"):
        fit(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps = N_STEPS + 2
    on(trainer, module)
    record = record_of(tmp_path)
    assert (record.run_status, record.step, record.restarts) == ("done", N_STEPS + 2, 1)
    assert steps_of(tmp_path) == [0, 2, 4, 6, 8]


def test_two_fits_do_not_write_into_one_directory(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(RunIsBusyError):
        fit(tmp_path)
    lock.release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"val_check_interval": 2}, "val_check_interval=2"),
        ({"check_val_every_n_epoch": 3}, "check_val_every_n_epoch=3"),
        (
            {"val_check_interval": 2, "check_val_every_n_epoch": None},
            "val_check_interval=2, check_val_every_n_epoch=None",
        ),
    ],
)
def test_an_interval_of_validation_that_has_no_effect_is_named_once(tmp_path, given, named):
    """Not in a second fit of the trainer, whose interval the monitor itself has set."""
    trainer = trainer_of(nerve.SpectralMonitor(tmp_path / "run", every_n_steps=2), **given)
    with pytest.warns(UserWarning, match=f"trainer's {named} has no effect: .*every_n_steps"):
        on(trainer, Module())
    trainer.fit_loop.epoch_loop.max_steps += 1
    on(trainer, Module())


def test_a_fit_that_would_measure_nothing_leaves_no_run(tmp_path):
    """So that it can be corrected and repeated in the same directory."""
    with pytest.raises(ConfigError, match="would measure nothing"):
        fit(tmp_path / "run", every_n_steps=None, steps=[6], source="train")
    with pytest.raises(ConfigError, match="names monitor, which the run itself uses"):
        fit(tmp_path / "run", config={"monitor": 1})
    with pytest.raises(ConfigError, match="config must be a mapping"):
        fit(tmp_path / "run", config=["a"])
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "run", every_n_steps=None, steps=[3], source="train")


def test_a_run_whose_last_rows_cannot_be_compacted_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(nerve.RunStore, "compact", lambda store: raising(StoreError("full"))())
    with pytest.raises(StoreError, match="full"):
        fit(tmp_path)
    assert record_of(tmp_path).run_status == "failed"
    assert steps_of(tmp_path) == [0, 2, 4, 6]


class Watches(L.Callback):
    """Waits for a heartbeat in a validation, in which no step ends."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run.json"
        self.steps: list[int] = []

    def on_validation_batch_start(self, trainer: L.Trainer, *given) -> None:
        if trainer.sanity_checking:
            return
        until = time.monotonic() + 60.0
        while self.read()["step"] != trainer.global_step:
            assert time.monotonic() < until, "no heartbeat"
            time.sleep(0.001)
        self.steps.append(trainer.global_step)

    def read(self) -> dict:
        return json.loads(self.path.read_text())


def test_a_fit_beats_and_tells_its_step_however_long_a_validation_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)
    watches = Watches(tmp_path)
    fit(tmp_path, watches)
    assert watches.steps == [2, 4, 6]


@pytest.mark.parametrize("raises", [False, True])
def test_a_fit_that_has_ended_keeps_no_model(tmp_path, raises):
    module = Module()
    seen = weakref.ref(module.model)
    monitor = nerve.SpectralMonitor(tmp_path, every_n_steps=2)

    def train(module: L.LightningModule) -> None:
        on(trainer_of(monitor, *([At(3, raising(ValueError()))] if raises else [])), module)

    if raises:
        with pytest.raises(ValueError):  # noqa: PT011 - the only one
            train(module)
    else:
        train(module)
    del module
    gc.collect()
    assert seen() is None
    assert monitor.latest


def test_other_stages_of_a_trainer_record_nothing(tmp_path):
    batch = torch.randn(9, 4)
    trainer = trainer_of(nerve.SpectralMonitor(tmp_path / "run", every_n_steps=2))
    trainer.validate(Module(), Batches([batch]), verbose=False)
    assert not (tmp_path / "run").exists()
