"""What `nerve-run` does in a directory that already holds a run."""

import errno
import json
import math
import os
import re
import signal
import sys
from multiprocessing.connection import wait
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write
from processes import ended, nerve_run
from support import composed

import nerve
from nerve.cli.experiment.start import _save, start
from nerve.errors import StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.state import RunLock, RunState
from nerve.training.gathering import Gathering
from nerve.training.module import TrainedModel

LIBRARY = Path(os.__file__).parent


@pytest.fixture
def tiny(small) -> list[str]:
    return [*small, "trainer.max_steps=4", "hydra.run.dir=mine"]


@pytest.fixture
def files(tmp_path):
    """Every file of the run and when it was written."""

    def look() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    return look


def test_a_completed_run_reports_it_and_does_nothing(run, tiny, files):
    assert run(*tiny)[0] == 0
    before = files()
    status, out, err = run(*tiny, "threads=2", "checkpoint.every_n_steps=1")
    assert (status, err) == (0, "")
    loss = RunRecord.load("mine").final["val_loss"]
    assert f"is finished: validation loss {loss:.3f}; there is nothing to do" in out
    assert files() == before


def as_an_earlier_version_wrote_it(directory: str) -> str:
    """Changes the id in the record and the module of the data, and removes a key added since."""
    path = Path(directory) / "run.json"
    values = json.loads(path.read_text())
    values["config_id"], now = "0123456789ab", values["config_id"]
    values["config"]["data"]["_target_"] = "nerve.where.it.was.TextDataModule"
    values["config"]["monitor"].pop("skip_first", None)
    del values["checksum"]
    path.write_text(json.dumps(values))
    return now


def test_a_directory_of_an_earlier_version_is_resumed(run, tiny, stop_at, go_on):
    """Also with an infinite value, for which run.json has a special form."""
    stop_at(1, signal.SIGINT)
    infinite = [*tiny, "trainer.gradient_clip_val=inf"]
    assert run(*infinite)[0] == 130
    go_on()
    now = as_an_earlier_version_wrote_it("mine")
    assert RunRecord.load("mine").config["trainer"]["gradient_clip_val"] == math.inf
    status, out, err = run(*infinite)
    assert (status, err) == (0, "")
    assert "resuming run" in out
    assert json.loads(Path("mine/run.json").read_text())["config_id"] == now
    as_an_earlier_version_wrote_it("mine")
    assert "there is nothing to do" in run(*infinite)[1]
    assert "there is nothing to do" in run("resume=mine")[1]
    assert nerve.load_runs("mine").config_id.tolist() == [now]
    assert "gradient_clip_val (inf, now 1.0)" in run(*tiny)[2]


def test_other_values_are_refused_by_name(run, tiny, files):
    assert run(*tiny)[0] == 0
    before = files()
    status, _, err = run(*tiny, "optimizer.lr=0.01", "model.d_model=32")
    assert status == 1
    assert "optimizer.lr (0.003, now 0.01)" in err
    assert "model.d_model (16, now 32)" in err
    assert files() == before


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR2, 140)]
)
def test_an_interrupted_run_prints_how_to_resume_it(run, tiny, stop_at, go_on, signum, status):
    stop_at(1, signum)
    ended, out, err = run(*tiny)
    go_on()
    assert (ended, err) == (status, "")
    assert f"nerve-run resume={Path('mine').resolve()}" in out
    record = RunRecord.load("mine")
    assert (record.run_status, record.step) == ("interrupted", 2)
    assert record.error == {
        "type": "Interrupted",
        "message": f"stopped by {signal.Signals(signum).name}",
    }
    ended, out, _ = run(*tiny)
    assert ended == 0
    assert f"resuming run {record.run_id}" in out
    again = RunRecord.load("mine")
    assert (again.run_status, again.restarts, again.error) == ("done", 1, None)
    assert (again.run_id, again.started) == (record.run_id, record.started)
    assert again.final["train_seconds"] > again.final["measuring_seconds"] > 0


def test_after_a_second_ctrl_c_the_run_resumes_from_its_last_checkpoint(
    run, tiny, stop_at, go_on, assert_same
):
    """The first comes in the first micro-batch of step 3, the second in the next one."""
    arguments = [*tiny, "trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=1"]
    assert run(*arguments, "hydra.run.dir=whole")[0] == 0
    stop_at(4, signal.SIGINT, from_then_on=True)
    assert run(*arguments)[0] == 130
    record = RunRecord.load("mine")
    assert (record.run_status, record.step) == ("interrupted", 2)
    assert record.error == {"type": "Interrupted", "message": "stopped by SIGINT"}
    go_on()
    assert run(*arguments)[0] == 0
    assert_same("whole", "mine")


@pytest.mark.parametrize("again", [False, True], ids=["new", "resumed"])
def test_a_run_that_is_stopped_as_it_starts_is_interrupted(run, tiny, monkeypatch, stop_at, again):
    """After its record says that it runs, and before its end would be recorded."""
    if again:
        stop_at(1, signal.SIGTERM)
        assert run(*tiny)[0] == 143
    monkeypatch.setattr(Gathering, "begin", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert run(*tiny)[0] == 130
    record = RunRecord.load("mine")
    assert (record.run_status, record.restarts) == ("interrupted", int(again))
    assert record.error == {"type": "Interrupted", "message": "stopped by SIGINT"}


def test_the_previous_signal_handler_is_called_once_all_is_saved(run, tiny, stop_at):
    """As in a job of submitit, whose handler requeues the job and exits."""
    seen = []

    def requeue(signum, frame):
        record = RunRecord.load("mine")
        last = RunDirectory("mine").checkpoint("last")
        seen.append((record.run_status, record.step, last.exists()))
        sys.exit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        stop_at(2, signal.SIGUSR2)
        status, _, _ = run(*tiny)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (status, seen) == (-1, [("interrupted", 3, True)])


def test_a_failed_run_is_restarted_only_on_request(run, tiny, stop_at, go_on, monkeypatch, files):
    stop_at(3, nerve.errors.DataError("the batch is rotten"))
    assert run(*tiny, "checkpoint.every_n_steps=1")[0] == 1
    go_on()
    before = files()
    status, _, err = run(*tiny)
    assert status == 1
    assert "failed with DataError: the batch is rotten" in err
    assert "add retry=true, or choose another directory with hydra.run.dir=…." in err
    assert {path: time for path, time in files().items() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }
    seen = []
    monkeypatch.setattr(TrainedModel, "on_train_batch_start", lambda *args: seen.append(args[-1]))
    assert run(*tiny, "retry=true")[0] == 0
    assert seen == [3]  # from its last checkpoint
    assert RunRecord.load("mine").run_status == "done"


def test_a_run_without_a_checkpoint_starts_from_its_beginning(run, tiny, stop_at, go_on):
    stop_at(3, nerve.errors.DataError("the batch is rotten"))
    assert run(*tiny)[0] == 1
    go_on()
    assert nerve.load_metrics("mine").step.max() == 2
    assert not RunDirectory("mine").checkpoint("last").exists()
    status, out, err = run(*tiny, "retry=true")
    assert status == 0
    assert "the run starts from the beginning" in out + err
    rows = nerve.load_metrics("mine")
    assert rows.step.unique().tolist() == [0, 2, 4]


def test_a_run_of_another_process_is_left_alone(run, tiny, files):
    lock = RunLock("mine")
    before = files()
    status, _, err = run(*tiny)
    lock.release()
    assert status == 1
    assert f"in use by process {os.getpid()}" in err
    assert files() == before


def test_other_data_than_at_the_start_are_refused(run, tiny, stop_at, go_on, tmp_path):
    """The configuration is the same, but the folder that it names has changed."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for path in (LIBRARY / "json").glob("*.py"):
        (corpus / path.name).write_text(path.read_text())
    arguments = [*tiny, f"data.corpus.roots=[{corpus}]"]
    stop_at(1, signal.SIGTERM)
    assert run(*arguments)[0] == 143
    go_on()
    (corpus / "scanner.py").write_text("changed = True\n" * 100)
    status, _, err = run(*arguments)
    assert status == 1
    assert "must be resumed with the same data" in err
    assert "corpus" in err


def test_a_damaged_checkpoint_is_named(run, tiny, stop_at, go_on):
    stop_at(1, signal.SIGTERM)
    assert run(*tiny)[0] == 143
    go_on()
    path = RunDirectory("mine").checkpoint("last")
    path.write_bytes(path.read_bytes()[:1000])
    status, _, err = run(*tiny)
    assert status == 1
    assert "last.ckpt" in err
    assert "Restore it, or delete it" in err
    path.unlink()
    assert run(*tiny, "retry=true")[0] == 0


HELD = """
import time
from pathlib import Path

import lightning as L


class Held(L.Callback):
    def on_train_start(self, trainer, pl_module):
        given_up = time.monotonic() + 120
        while not Path("one_has_ended").exists() and time.monotonic() < given_up:
            time.sleep(0.05)
"""


def test_of_two_processes_one_runs_and_the_other_reports_that(tiny, tmp_path):
    """Started at the same moment with the same directory. The one that runs does not end before the
    other, however late that begins."""
    (tmp_path / "held.py").write_text(HELD)
    command = [*tiny, "+callbacks.held._target_=held.Held"]
    logs = [tmp_path / f"{name}.log" for name in ("one", "other")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    both = [nerve_run(command, cwd=tmp_path, log=log, environment=environment) for log in logs]
    wait([process.sentinel for process in both], timeout=100)
    (tmp_path / "one_has_ended").touch()
    outcomes = {
        ended(process): (process.pid, log.read_text())
        for process, log in zip(both, logs, strict=True)
    }
    assert sorted(outcomes) == [0, 1], outcomes
    said = outcomes[1][1]
    assert said.startswith("nerve-run: ")
    assert f"in use by process {outcomes[0][0]}" in said
    record = RunRecord.load(tmp_path / "mine")
    assert (record.run_status, record.restarts) == ("done", 0)
    assert RunDirectory(tmp_path / "mine").state == RunState.DONE


def test_the_progress_bar_of_a_resumed_run_starts_at_its_step(run, tiny, stop_at, go_on):
    bar = [*tiny, "trainer.enable_progress_bar=true"]
    stop_at(1, signal.SIGTERM)
    assert run(*bar)[0] == 143
    go_on()
    status, out, _ = run(*bar)
    assert status == 0
    assert re.search(r"\| 4/4 ", out)


@pytest.mark.parametrize("where", ["omegaconf.OmegaConf.save", "pathlib.Path.mkdir"])
def test_a_full_disk_at_the_start_is_reported_as_such(tmp_path, monkeypatch, where):
    """Before anything else is written: the configuration comes first."""

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = composed(with_hydra=True)
    monkeypatch.setattr(where, refuse)
    with pytest.raises(
        StoreError, match=r"config\.yaml cannot be written: .*No space left.*Free up space"
    ):
        _save(RunDirectory(tmp_path), config, config.hydra)


def test_a_resumed_run_names_the_foreign_targets_of_its_directory(tmp_path, caplog):
    """They were not given on the command line this time."""
    config = composed("+callbacks.mine._target_=own.code.Thing", with_hydra=True)
    HydraConfig.instance().set_config(config)
    hydra_config = config.hydra
    with read_write(config), open_dict(config):
        del config["hydra"]
    for n_said in (0, 1):
        start(RunDirectory(tmp_path), config, hydra_config).finish("interrupted")
        assert caplog.text.count("this directory calls own.code.Thing") == n_said
