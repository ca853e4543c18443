"""Runs that are interrupted, and what they must leave at the end."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write
from support import TINY_RUN, composed

import nerve
from nerve.cli.experiment.run import run_experiment
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.training.checkpoint_files import (
    read_checkpoint,
    weights_of,
)
from nerve.training.module import TrainedModel


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a SLURM job, a run would wait to be killed."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


@pytest.fixture
def small() -> list[str]:
    """Arguments of a run that takes a fraction of a second."""
    return list(TINY_RUN)


@pytest.fixture
def experiment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., float]:
    """Runs an experiment in `<tmp_path>/<name>` without the command around it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def call(name: str, *overrides: str) -> float:
        config = composed(*TINY_RUN, *overrides, with_hydra=True)
        HydraConfig.instance().set_config(config)
        hydra_config = HydraConfig.get()
        with read_write(config), open_dict(config):
            del config["hydra"]
        with read_write(hydra_config):
            hydra_config.runtime.output_dir = str(tmp_path / name)
        return run_experiment(config, hydra_config)

    return call


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the forward pass of a micro-batch raise an error, or this process get a signal in it;
    with `from_then_on` those of all later micro-batches, too."""
    training_step = TrainedModel.training_step

    def choose(index: int, cause: BaseException | int, *, from_then_on: bool = False) -> None:
        def stopping(module, batch, batch_idx):
            if batch_idx == index or (from_then_on and batch_idx > index):
                if isinstance(cause, BaseException):
                    raise cause
                os.kill(os.getpid(), cause)
            return training_step(module, batch, batch_idx)

        monkeypatch.setattr(TrainedModel, "training_step", stopping)

    return choose


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Undoes `stop_at`."""
    training_step = TrainedModel.training_step
    return lambda: monkeypatch.setattr(TrainedModel, "training_step", training_step)


def _rows(directory: Path, load: Callable[..., pd.DataFrame]) -> pd.DataFrame:
    """All stored rows without the run id, sorted by their keys."""
    frame = load(directory).drop(columns=["run_id", "run_status"])
    keys = [name for name in ("step", "layer", "ffn", "site", "name") if name in frame]
    return frame.sort_values(keys).reset_index(drop=True)


@pytest.fixture
def assert_same(tmp_path: Path) -> Callable[[str, str], None]:
    """Two finished runs left the same, bit for bit: rows of all tables, CSV text, the last
    weights, the best and the kept ones, and the final scores."""

    def check(one: str, other: str) -> None:
        both = [tmp_path / one, tmp_path / other]
        for load in (nerve.load_metrics, nerve.load_spectra, nerve.load_scalars):
            pd.testing.assert_frame_equal(*(_rows(path, load) for path in both), check_exact=True)
        a, b = (Path(path, "logs", "metrics.csv").read_text() for path in both)
        assert a == b
        for which in ("last", "best"):
            # A process that dies as it ends may leave its last checkpoint with all that was in it.
            files = (RunDirectory(path).checkpoint(which) for path in both)
            a, b = (weights_of(read_checkpoint(file)) for file in files)
            assert (a["step"], list(a["model"])) == (b["step"], list(b["model"]))
            for name, weight in a["model"].items():
                assert torch.equal(weight, b["model"][name]), f"{name} of {which}"
        steps, others = (RunDirectory(path).kept_steps() for path in both)
        assert steps == others
        for step in steps:
            a, b = (read_checkpoint(RunDirectory(path).kept_checkpoint(step)) for path in both)
            assert a["step"] == b["step"] == step
            assert a["model"].keys() == b["model"].keys()
            for name, weight in a["model"].items():
                assert torch.equal(weight, b["model"][name]), f"{name} of step {step}"
        records = [RunRecord.load(path) for path in both]
        assert [record.run_status for record in records] == ["done", "done"]
        a, b = (
            {name: value for name, value in record.final.items() if not name.endswith("_seconds")}
            for record in records
        )
        assert a == b

    return check
