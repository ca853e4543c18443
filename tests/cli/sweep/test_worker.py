"""A trial in its own process, and in a cluster job, which composes its configuration again."""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf, open_dict, read_write
from support import composed

from nerve.cli.config.compose import decoded, encoded, identity, resolved
from nerve.cli.sweep import worker
from nerve.cli.sweep.worker import run_trial
from nerve.errors import DataError, DivergedError, StoreError
from nerve.storage.record import RunRecord
from nerve.training.signals import Interrupted


def test_a_trial_whose_configuration_files_changed_after_submission_is_refused(
    tmp_path, monkeypatch
):
    """Its directory has the id of what was submitted; one with a chosen name has none."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr("nerve.cli.experiment.run.run_experiment", lambda *_: 1.5)

    def run(name: str, *overrides: str) -> float:
        config = composed(*overrides, with_hydra=True)
        HydraConfig.instance().set_config(config)
        hydra_config = HydraConfig.get()
        with read_write(hydra_config), open_dict(hydra_config):
            hydra_config.runtime.output_dir = str(tmp_path / name)
        return run_trial(config, hydra_config)

    config = composed("seed=3", "logger=none")
    sent = identity(config)
    assert run(sent, "seed=3") == 1.5
    assert run("mine", "seed=4") == 1.5
    placed = "+callbacks.ck.dirpath=${hydra:runtime.output_dir}/ck"  # not known when it is sent
    assert run(sent, "seed=3", placed) == 1.5
    with pytest.raises(StoreError, match=f"has configuration {sent}, and the configuration"):
        run(sent, "seed=3", "optimizer.lr=0.5")
    assert not list(tmp_path.iterdir())
    # A run that an earlier version gave the directory another id.
    record = RunRecord.create(tmp_path / "0123456789ab", resolved(config))
    assert record.config_id == sent
    assert run("0123456789ab", "seed=3") == 1.5
    with pytest.raises(StoreError, match=f"has configuration {sent}, and the configuration"):
        run("0123456789ab", "seed=3", "optimizer.lr=0.5")


class InThisProcess(Launcher):
    """Runs jobs as in a cluster job, and does not return how they ended."""

    def __init__(self, **_):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        returns = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            composed = self.context.config_loader.load_sweep_config(self.config, overrides)
            with read_write(composed.hydra), open_dict(composed.hydra):
                composed.hydra.job.id = composed.hydra.job.num = number
            returns.append(
                run_job(
                    hydra_context=self.context,
                    task_function=self.task,
                    config=composed,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
            )
        return returns


def test_the_log_of_a_job_says_why_its_trial_failed(run, monkeypatch):
    name = "hydra_plugins.here.InThisProcess"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, InThisProcess)
    trial = Path("outputs", "multirun")
    status, _, err = run("-m", f"hydra.launcher._target_={name}", "data.corpus.roots=[/nowhere]")
    assert status == 1
    log, _, summary = err.partition("1 of 1 trial in")
    assert "nerve-run: A root of python_source must be a folder" in log
    assert "got '/nowhere'" in log
    assert "failed: DataError: A root of python_source" in summary
    assert [path.name for path in trial.glob("*/run.json")] == ["run.json"]


class Float(Sweeper):
    """Requires that trials return numbers, like the sweeper of Optuna."""

    def __init__(self, **_):
        pass

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        for number, trial in enumerate(self.launcher.launch([["seed=0"]], initial_job_idx=0)):
            try:
                float(trial.return_value)
            except (ValueError, TypeError):
                raise ValueError(
                    f"Return value must be float-castable. Got '{trial.return_value}'."
                ) from None
            assert number == 0


@pytest.mark.parametrize(
    "error",
    [
        DivergedError("the training loss became nan at step 3"),
        DataError("no corpus"),
        StoreError("the directory is full"),
    ],
)
def test_another_sweeper_gets_the_error_of_a_trial(run, monkeypatch, error):
    """Instead of the return value None."""
    name = "hydra_plugins.other.Float"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, Float)

    def fail(config, hydra_config):
        raise error

    monkeypatch.setattr("nerve.cli.experiment.run.run_experiment", fail)
    status, out, err = run("-m", f"hydra.sweeper._target_={name}")
    assert status == 1
    assert err.splitlines()[-1] == f"nerve-run: {error}"
    assert "None" not in out + err


def test_a_trial_gets_the_configuration_that_was_composed():
    """Values and keys of any type, and interpolations."""
    added = ["+callbacks.a.at={100: 0.5, x: inf}", "objective=${seed}", "seed='1e3'"]
    config = composed(*added, with_hydra=True)
    received = decoded(encoded(config))
    assert OmegaConf.to_container(received) == OmegaConf.to_container(config)
    assert received.callbacks.a.at == {100: 0.5, "x": math.inf}


def test_a_worker_ends_if_its_sweep_is_gone_before_it_sent_the_configuration(monkeypatch):
    reading, writing = os.pipe()
    os.close(writing)
    monkeypatch.setattr(worker, "STDIN", reading)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        worker.main()
    signal.signal(signal.SIGINT, handler)
    os.close(reading)
    assert exit_.value.code == 130


@pytest.mark.parametrize("hands_on", [False, True], ids=["alone", "within a job's handler"])
def test_a_trial_that_timed_out_before_it_began_leaves_a_record(tmp_path, monkeypatch, hands_on):
    """A signal arrives while it starts; the handler of a job may exit by itself."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    config = composed("seed=3", "logger=none", with_hydra=True)
    HydraConfig.instance().set_config(config)
    hydra_config = HydraConfig.get()
    with read_write(hydra_config), open_dict(hydra_config):
        hydra_config.runtime.output_dir = str(tmp_path)

    def stopped(config, hydra_config):
        try:
            raise Interrupted.by(signal.SIGUSR2)
        finally:
            if hands_on:
                sys.exit(-1)

    monkeypatch.setattr("nerve.cli.experiment.run.run_experiment", stopped)
    with pytest.raises(SystemExit):
        run_trial(config, hydra_config)
    record = RunRecord.load(tmp_path)
    assert record.run_status == "interrupted"
    assert record.error == {"type": "Interrupted", "message": "stopped by SIGUSR2"}
