"""Sweeps: each trial runs once, a mishap affects only its trial, and all are accounted for.

Trials are processes as usual, but their training is a stand-in (stand_in.py), so that each takes a
second. Real training in a sweep is in test_run.py.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import composing
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf
from processes import start

from nerve import cores
from nerve.cli.experiment.plan import Plan
from nerve.cli.run import main
from nerve.cli.sweep import local
from nerve.cli.sweep.grid import Trial
from nerve.cli.sweep.sweeper import BASIC, JOBLIB
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.state import FRESH, RunLock, RunState

STAND_IN = Path(__file__).with_name("stand_in.py")
FOLDER = Path("outputs/multirun")
Sweep = Callable[..., tuple[int, str, str]]


@pytest.fixture
def sweep(run, monkeypatch) -> Sweep:
    """Calls `nerve-run -m`; returns exit status, stdout without repeated blanks, and stderr."""
    monkeypatch.setattr(local, "COMMAND", [sys.executable, "-P", str(STAND_IN)])
    # A shell that starts the tests in its background has them ignore Ctrl-C, and so would a sweep.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    befalls({})

    def call(*arguments: str) -> tuple[int, str, str]:
        status, out, err = run("-m", *arguments)
        assert "Traceback" not in out + err
        return status, re.sub(r"[ │┃]+", " ", out), err

    return call


def befalls(deeds: dict[int, str]) -> None:
    """Sets what happens to the trials of these seeds from now on."""
    Path("deeds.json").write_text(json.dumps(deeds))


def records() -> dict[int, RunRecord]:
    """The record of each seed's run."""
    found = map(RunRecord.load, sorted(path.parent for path in FOLDER.glob("*/run.json")))
    return {record.seed: record for record in found}


def statuses() -> dict[int, str]:
    return {seed: record.run_status for seed, record in sorted(records().items())}


def n_starts(seed: int) -> int:
    return len((records()[seed].directory / "starts").read_text().splitlines())


def test_a_repeated_command_starts_nothing_and_a_larger_grid_only_its_new_trials(sweep):
    assert sweep("seed=0,1")[0] == 0
    files = sorted(path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".yaml")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    status, out, _ = sweep("seed=0,1")
    assert status == 0
    assert "2 trials, 2 done; 0 to run" in out
    assert "0 seed=0 skipped done 400/400 0.500" in out
    assert out.splitlines()[-2:] == [
        "report: nerve-report outputs/multirun",
        f"in a notebook: import nerve; metrics = nerve.load_metrics({str(FOLDER.absolute())!r})",
    ]
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    status, out, _ = sweep("seed=0,1,2", "threads=1")  # which does not make other trials of them
    assert status == 0
    assert "3 trials, 2 done, 1 new; 1 to run" in out
    assert "2 seed=2 run done 400/400 2.500" in out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert statuses() == {0: "done", 1: "done", 2: "done"}
    assert {record.sweep for record in records().values()} == {"multirun"}
    assert {record.directory.name for record in records().values()} == {
        record.config_id for record in records().values()
    }


def test_interrupted_and_killed_trials_are_resumed_in_place(sweep):
    assert sweep("seed=0,1,2")[0] == 0
    for seed, run_status in ((0, "interrupted"), (1, "running")):
        records()[seed].update(run_status=run_status, final={})
    status, out, _ = sweep("seed=0,1,2")
    assert status == 0
    assert "3 trials, 1 interrupted, 1 killed, 1 done; 2 to run" in out
    for line in ("0 seed=0 resumed done", "1 seed=1 resumed done", "2 seed=2 skipped done"):
        assert line in out
    assert {seed: record.restarts for seed, record in records().items()} == {0: 1, 1: 1, 2: 0}
    assert [n_starts(seed) for seed in (0, 1, 2)] == [2, 2, 1]


def as_an_earlier_version_left(seed: int, name: str) -> Path:
    """Changes the id in the name and in the record of a run's directory; returns the new path."""
    record = records()[seed]
    moved = record.directory.rename(FOLDER / name)
    path = moved / "run.json"
    values = json.loads(path.read_text().replace(record.config_id, name))
    path.write_text(json.dumps(values | {"checksum": None}))
    return moved


def test_runs_that_an_earlier_version_named_differently_are_found_and_resumed(sweep):
    """Each in its own directory, whose files are kept; records are rarely read."""
    assert sweep("seed=0,1,2,3")[0] == 0
    moved = [as_an_earlier_version_left(seed, f"{seed}23456789abc") for seed in (0, 1, 2)]
    for seed, run_status in ((1, "interrupted"), (2, "failed")):
        records()[seed].update(run_status=run_status, final={})
    (FOLDER / "notes").mkdir()
    ids = {record.config_id for record in records().values()}
    reads, load = Counter(), RunRecord.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunRecord, "load", lambda path: reads.update([str(path)]) or load(path))
        status, out, err = sweep("seed=0,1,2,3,4")
    # Before the first one starts, and at the end; of one that runs, as it starts and as it ends.
    in_turn = [reads[str(records()[seed].directory)] for seed in range(4)]
    assert (in_turn, max(reads.values())) == ([2, 3, 2, 2], 3)
    assert status == 1
    assert "5 trials, 2 done, 1 interrupted, 1 failed, 1 new; 2 to run" in out
    assert "0 seed=0 skipped done 400/400 0.500 023456789abc" in out
    assert "1 seed=1 resumed done 400/400 1.500 123456789abc" in out
    assert re.search(r"2 seed=2 skipped failed 400/400 \S* ?223456789abc", out)
    assert "4 seed=4 run done" in out
    assert "2 (seed=2): failed" in err
    status, out, _ = sweep("seed=0,1,2,3,4", "retry=true", "hydra.sweeper.n_jobs=10")
    assert status == 0
    assert "2 seed=2 retried done 400/400 2.500 223456789abc" in out
    assert [n_starts(seed) for seed in range(5)] == [1, 2, 2, 1, 1]
    assert [records()[seed].directory for seed in (0, 1, 2)] == moved
    assert {record.config_id for record in records().values()} > ids


def test_of_two_runs_of_one_configuration_the_better_one_is_used_and_named(sweep):
    """Done before interrupted, then the one that got further; names do not matter."""
    assert sweep("seed=0,1")[0] == 0
    for seed, status_of_copy, step_of_copy in ((0, "done", 400), (1, "interrupted", 30)):
        record = records()[seed]
        copy = FOLDER / f"{seed}23456789abc"
        shutil.copytree(record.directory, copy)
        RunRecord.load(copy).update(run_status=status_of_copy, step=step_of_copy)
        record.update(run_status="interrupted", step=20, final={})
    status, out, _ = sweep("seed=0,1")
    assert status == 0
    assert "2 trials, 1 done, 1 interrupted; 1 to run" in out
    assert (
        f"{FOLDER}/023456789abc (done, step 400/400) is used; ignored, with the same configuration"
        in out
    )
    assert f"{FOLDER}/123456789abc (interrupted, step 30/400) is used" in out
    assert "0 seed=0 skipped done 400/400 0.500 023456789abc" in out
    assert "1 seed=1 resumed done 400/400 1.500 123456789abc" in out
    assert "is used; ignored" in sweep("seed=0,1")[1]


def test_an_unreadable_record_is_named_and_belongs_to_no_trial(sweep):
    assert sweep("seed=0")[0] == 0
    broken = as_an_earlier_version_left(0, "023456789abc") / "run.json"
    broken.write_text(broken.read_text()[:40])
    status, out, _ = sweep("seed=0")
    assert status == 0
    assert "skipped: outputs/multirun/023456789abc/run.json is not the record of a run" in out
    assert "0 the only one run done" in out


def test_a_trial_that_another_process_is_running_is_left_alone(sweep):
    assert sweep("seed=0")[0] == 0
    record = records()[0]
    record.update(run_status="running")
    lock = RunLock(record.directory)
    status, out, err = sweep("seed=0,1")
    lock.release()
    assert status == 1
    assert "0 seed=0 skipped alive" in out
    assert "1 seed=1 run done" in out
    assert "0 (seed=0): running elsewhere" in err
    assert n_starts(0) == 1


MISHAPS = {
    "raise": ("failed", "RuntimeError: no luck"),
    "refuse": ("failed", "ConfigError: seed must be lucky"),
    "vanish": ("failed", "exit status 3"),
    "be killed": ("interrupted", "killed (SIGKILL)"),
}


@pytest.mark.parametrize("deed", MISHAPS)
def test_a_mishap_affects_only_its_trial_and_is_reported(sweep, deed):
    run_status, reason = MISHAPS[deed]
    befalls({0: deed})
    status, out, err = sweep("seed=0,1")
    assert status == 1
    assert statuses() == {0: run_status, 1: "done"}
    assert f"0 seed=0 run {run_status}" in out
    assert "1 seed=1 run done" in out
    assert "1 of 2 trials in outputs/multirun are not done" in err
    assert f"0 (seed=0): {run_status}" in err
    assert reason in err
    assert reason.partition(": ")[2] in records()[0].error["message"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_ends_silently_is_reported_with_its_exit_status(status):
    """Even if it is 0: a library may end the process with it."""
    assert f"exit status {status} before the run did" in str(local._error(status))


def test_failed_trials_are_kept_until_they_are_retried(sweep):
    befalls({0: "raise"})
    assert sweep("seed=0,1")[0] == 1
    befalls({})
    status, out, err = sweep("seed=0,1")
    assert status == 1
    assert "0 seed=0 skipped failed" in out
    assert "RuntimeError: no luck" in err
    assert "retry=true" in err
    assert n_starts(0) == 1
    status, out, _ = sweep("seed=0,1", "retry=true")
    assert status == 0
    assert "0 seed=0 retried done" in out
    assert "1 seed=1 skipped done" in out
    assert (n_starts(0), n_starts(1)) == (2, 1)


@pytest.mark.parametrize(("deed", "told"), [("hang", ""), ("hang deaf", "did not end within")])
def test_a_trial_that_hangs_is_stopped_at_the_time_limit(sweep, monkeypatch, deed, told):
    """The limit is over as soon as the trial hangs, however long it took to start."""

    def now() -> float:
        return time.monotonic() + 3600 * any(FOLDER.glob("*/hangs"))

    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
    if told:
        monkeypatch.setattr(local, "GRACE_S", 0.5)
    befalls({0: deed})
    status, _, err = sweep("seed=0,1", "hydra.sweeper.timeout_min=30")
    assert status == 1
    assert statuses() == {0: "interrupted", 1: "done"}
    assert "the limit of hydra.sweeper.timeout_min" in err
    assert told in err
    assert RunDirectory(records()[0].directory).state == RunState.INTERRUPTED
    assert records()[0].error["type"] == ("KilledError" if told else "TimeLimitError")


def test_a_time_limit_must_be_positive(sweep):
    status, _, err = sweep("seed=0,1", "hydra.sweeper.timeout_min=0")
    assert status == 1
    assert "hydra.sweeper.timeout_min must be null or a positive number; got 0" in err


def test_trials_run_side_by_side_on_request(sweep, monkeypatch):
    """Each waits for the other to start, and gets a share of the cores, a GPU, and a log."""
    for pool in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.delenv(pool, raising=False)
    monkeypatch.setattr(cores, "allowed", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    befalls({0: "meet", 1: "meet"})
    status, out, _ = sweep("seed=0,1", "hydra.sweeper.n_jobs=2")
    assert status == 0, out
    assert "progress: nerve-status outputs/multirun; each trial writes output.log" in out
    assert statuses() == {0: "done", 1: "done"}
    for record in records().values():
        assert (record.directory / "starts").read_text().split()[1:4] == ["3", "3", "3"]
        assert (record.directory / local.LOG_NAME).exists()
    starts = [(record.directory / "starts").read_text().split() for record in records().values()]
    assert sorted(gpu for *_, gpu in starts) == ["4", "7"]


@pytest.mark.parametrize(
    ("n_jobs", "seeds", "shares"),
    [
        (8, "0,1", [["3", "3"], ["3", "3"]]),  # two run, though eight may
        (2, "0,1,2", [["3", "3"], ["3", "3"], [None, None]]),  # the third is the only one then
        (4, "0", [[None, None]]),
    ],
)
def test_cores_are_shared_only_by_running_trials(tmp_path, monkeypatch, n_jobs, seeds, shares):
    """The first ones end together, and then the last one starts."""
    monkeypatch.setattr(cores, "allowed", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    started = []

    def begin(trial, room):
        environment = local._share(room)
        started.append([environment.get(name) for name in (cores.SHARE, "OMP_NUM_THREADS")])

    monkeypatch.setattr(local, "_start", begin)
    monkeypatch.setattr(local._Process, "has_ended", lambda self, requests: True)
    trials = [
        Trial(n, [], OmegaConf.create(), RunDirectory(tmp_path / seed))
        for n, seed in enumerate(seeds.split(","))
    ]
    local.run_here(trials, n_jobs, None, lambda trial: None, lambda trial: None)
    assert started == shares


def test_a_trial_gets_the_import_paths_of_this_process_except_those_of_its_python(
    monkeypatch, tmp_path
):
    """Another Python that the trial calls must find its own standard library."""
    given = [str(tmp_path), "relative", "/elsewhere/archive.zip"]
    monkeypatch.setattr(sys, "path", [*given, *sys.path])
    paths = local._own_paths()["PYTHONPATH"].split(os.pathsep)
    assert paths[:3] == [str(tmp_path), os.path.abspath("relative"), "/elsewhere/archive.zip"]
    for module in (os, pytest):  # of the standard library, of an installed package
        assert str(Path(module.__file__).parent) not in paths
        assert str(Path(module.__file__).parents[1]) not in paths
    assert not any("lib-dynload" in path or path.endswith("311.zip") for path in paths)


def test_a_record_damaged_while_its_trial_waited_stops_no_other_trial(tmp_path, monkeypatch):
    """It was readable when the sweep began; nothing is started in its directory."""
    monkeypatch.setattr(local, "COMMAND", ["true"])
    monkeypatch.setattr(local, "record_end", lambda *given: None)
    monkeypatch.setattr(Trial, "values", lambda trial: {})
    trials = [Trial(n, [], OmegaConf.create({}), RunDirectory(tmp_path / f"{n}")) for n in (0, 1)]
    ended = []

    def damage(trial: Trial) -> None:
        if trial.number == 0:
            trial.directory.mkdir()
            (trial.directory / "run.json").write_text("{")

    assert local.run_here(trials, 1, None, damage, lambda trial: ended.append(trial.number)) is None
    assert ended == [0, 1]
    assert "run.json is not the record of a run" in trials[0].start_error
    assert trials[1].start_error is None


@pytest.mark.parametrize("deed", ["exit 130", "kill -INT $$"])
def test_a_trial_that_is_stopped_before_it_begins_is_not_started(tmp_path, monkeypatch, deed):
    """Also by the signal itself, before Python handles it: nobody has killed it."""
    monkeypatch.setattr(local, "COMMAND", ["bash", "-c", deed])
    monkeypatch.setattr(Trial, "values", lambda trial: {"seed": 0})
    trial = Trial(0, [], OmegaConf.create({}), RunDirectory(tmp_path / "run"))
    local.run_here([trial], 1, None, lambda trial: None, lambda trial: None)
    assert trial.run.reload().state == RunState.NEW
    assert trial.start_error is None


@pytest.mark.parametrize("deed", ["exit 0", "exit 3", "kill -9 $$"])
def test_a_process_group_is_killed_before_its_id_can_be_reused(tmp_path, monkeypatch, deed):
    """The exit status is collected last, which keeps the id reserved until then. Processes that the
    trial left behind are killed."""
    calls = []
    popen = subprocess.Popen(
        ["bash", "-c", f"sleep 100 & echo $! > {tmp_path}/left; {deed}"],
        stdin=subprocess.PIPE,
        process_group=0,
    )
    killpg, wait = os.killpg, popen.wait
    monkeypatch.setattr(os, "killpg", lambda *group: (calls.append("end"), killpg(*group)))
    monkeypatch.setattr(popen, "wait", lambda: (calls.append("take"), wait())[1])
    monkeypatch.setattr(local, "_start", lambda trial, room: popen)
    trial = Trial(0, [], OmegaConf.create({"seed": 0}), RunDirectory(tmp_path / "run"))
    process = local._Process(trial, local._Room(0, 1, False), None)
    wait_for(lambda: (tmp_path / "left").exists() and _is_zombie(popen.pid))
    process._ask_to_stop(time.monotonic())  # too late, and as if the number were a stranger's
    wait_for(lambda: process.has_ended(0))
    assert calls == ["end", "take"]
    left = int((tmp_path / "left").read_text())
    wait_for(lambda: not Path(f"/proc/{left}").exists() or _is_zombie(left))
    monkeypatch.setattr(os, "killpg", lambda *group: pytest.fail("a stranger's group"))
    process._kill()  # as for a trial that is told to stop late


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_trial_that_timed_out_before_it_began_is_reported(sweep):
    befalls({0: "start slowly"})
    status, _, err = sweep("seed=0,1", "hydra.sweeper.timeout_min=0.02")
    assert status == 1
    assert "0 (seed=0): interrupted: TimeLimitError: stopped after" in err
    assert statuses()[0] == "interrupted"
    assert not (records()[0].directory / "starts").exists()


def test_trials_that_define_the_same_result_are_run_once(sweep):
    status, out, _ = sweep("seed=0,1,0", "activation=gelu")
    assert status == 0
    assert "3 trials, 2 new, 1 repeated; 2 to run" in out
    assert "2 seed=0 same as 0 done" in out
    assert n_starts(0) == 1


def test_ctrl_c_stops_the_running_trial_and_starts_no_other(sweep):
    befalls({0: "stop the sweep"})
    status, out, err = sweep("seed=0,1")
    assert status == 128 + signal.SIGINT
    assert statuses() == {0: "interrupted"}
    assert "0 seed=0 run interrupted" in out
    assert "1 seed=1 not started new" in out
    assert "2 of 2 trials" in err
    befalls({})
    assert sweep("seed=0,1")[0] == 0
    assert [n_starts(seed) for seed in (0, 1)] == [2, 1]


def run_with(command: list[str]) -> None:
    """A sweep of two trials whose processes are started with this command."""
    local.COMMAND = command
    sys.argv = ["nerve-run", "-m", "seed=0,1"]
    main()


def test_a_trial_stops_when_the_sweep_is_killed(sweep, tmp_path):
    befalls({0: "hang"})
    log = tmp_path / "sweep.log"
    command = start(run_with, [sys.executable, "-P", str(STAND_IN)], cwd=tmp_path, log=log)
    wait_for(lambda: list(FOLDER.glob("*/starts")))
    assert RunDirectory(records()[0].directory).state == RunState.ALIVE
    command.kill()
    wait_for(lambda: statuses() == {0: "interrupted"})


def wait_for(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_trial_whose_values_cannot_be_resolved_does_not_affect_the_others(sweep):
    status, out, err = sweep("model=gpt_tiny,mixer_tiny", "data=python_source")
    assert status == 1
    assert "2 trials, 1 new, 1 refused; 1 to run" in out
    assert "0 model=gpt_tiny run done" in out
    assert "1 model=mixer_tiny refused" in out
    assert "'model.seq_len' not found, which data.seq_len refers to" in err
    assert {"model=mixer_tiny", "data=python_source"} <= set(re.split(r"[,.; ]+", err))


def test_each_trial_is_planned_once_before_the_first_starts(sweep, monkeypatch):
    """A refused trial leaves no files; one that is done is not planned."""
    planned: list[tuple[int, int]] = []
    plan_of = Plan.of

    def noting(config) -> Plan:
        planned.append((config.seed, config.model.n_heads))
        assert not list(FOLDER.glob("*/starts"))
        return plan_of(config)

    monkeypatch.setattr(Plan, "of", noting)
    status, out, err = sweep("seed=0", "model.n_heads=2,3,4")
    assert status == 1
    assert planned == [(0, 2), (0, 3), (0, 4)]
    assert "3 trials, 2 new, 1 refused; 2 to run" in out
    assert "1 model.n_heads=3 refused" in out
    assert "1 (model.n_heads=3): model.d_model must be a multiple of model.n_heads" in err
    assert len(list(FOLDER.glob("*/"))) == 2
    planned.clear()
    assert sweep("seed=0", "model.n_heads=2,4")[0] == 0
    assert planned == []


def test_a_misspelt_option_stops_the_sweep_before_anything_starts(sweep):
    status, _, err = sweep("activation=gelu,gelo")
    assert status == 1
    assert "got 'gelo'. Did you mean activation=gelu?" in err
    assert "trial 1 (activation=gelo) of 2 cannot be composed; nothing was started" in err
    assert not FOLDER.exists()


def test_a_launcher_that_is_not_installed_is_named_with_its_extra(sweep, monkeypatch):
    Plugins.instance()  # which registers what is installed
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], "submitit_slurm.yaml")
    status, _, err = sweep("seed=0,1", "hydra/launcher=submitit_slurm")
    assert status == 1
    assert 'pip install -e ".[slurm]"' in err


@pytest.mark.parametrize("is_installed", [True, False])
def test_the_former_way_to_run_in_parallel_is_answered_with_the_current_one(
    sweep, monkeypatch, is_installed
):
    Plugins.instance()
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, "joblib.yaml", raising=False)
    if is_installed:
        basic = launchers["basic.yaml"]
        node = OmegaConf.create({"_target_": JOBLIB, "n_jobs": 3})
        monkeypatch.setitem(launchers, "joblib.yaml", replace(basic, name="joblib.yaml", node=node))
        monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: None)
    for remembered in ("_defaults", "_composed"):  # of shipped options; this launcher is none
        monkeypatch.setattr(composing, remembered, {})
    status, _, err = sweep("seed=0,1", "hydra/launcher=joblib")
    assert status == 1
    assert f"hydra.sweeper.n_jobs={3 if is_installed else 2} instead" in err
    assert not FOLDER.exists()


@pytest.mark.parametrize("value", ["0", "-2", "1.5", "two"])
def test_an_invalid_number_of_jobs_is_refused(sweep, value):
    status, _, err = sweep("seed=0,1", f"hydra.sweeper.n_jobs={value}")
    assert status == 1
    assert "hydra.sweeper.n_jobs must be" in err


@pytest.mark.parametrize(
    ("given", "launcher", "expected"),
    [
        ("max_batch_size=2", BASIC, "max_batch_size counts the trials that another launcher gets"),
        ("timeout_min=30", "hydra_plugins.a.Launcher", "got 30 with another launcher"),
        ("n_jobs=2", "hydra_plugins.a.Launcher", "got 2 with another launcher"),
    ],
)
def test_a_value_that_the_launcher_would_ignore_is_refused(
    sweep, monkeypatch, given, launcher, expected
):
    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda *_, **__: None)
    where = [f"hydra.launcher._target_={launcher}", f"hydra.sweeper.{given}"]
    status, _, err = sweep("seed=0,1", *where)
    assert status == 1
    assert expected in err
    assert not FOLDER.exists()


def test_a_folder_that_cannot_be_written_is_named_before_anything_starts(sweep):
    status, _, err = sweep("seed=0,1", "hydra.sweep.dir=/proc/nerve")
    assert status == 1
    assert err.startswith("nerve-run: A run must be able to write in its directory; /proc/nerve")


def test_trials_that_would_start_more_processes_are_refused(sweep):
    status, out, err = sweep("trainer.devices=1,2", "seed=0")
    assert status == 1
    assert "0 trainer.devices=1 run done" in out
    assert "trainer.strategy=auto with trainer.devices=2 starts more" in err


def test_the_directories_are_those_given_to_hydra(sweep):
    chosen = ["hydra.sweep.dir=mine", "hydra.sweep.subdir=${hydra.job.num}_${seed}"]
    assert sweep("seed=3,4", *chosen)[0] == 0
    assert sorted(path.parent.name for path in Path("mine").glob("*/run.json")) == ["0_3", "1_4"]
    assert Path("mine/1_4/starts").read_text().split()[0] == "1"  # hydra.job.num
    status, out, _ = sweep("seed=3,4", *chosen)
    assert status == 0
    assert "2 trials, 2 done; 0 to run" in out
    status, _, err = sweep("seed=3,4", "activation=relu", *chosen)
    assert status == 1
    assert "mine/0_3 holds run" in err
    assert "activation.name" in err


@pytest.mark.parametrize("is_run_before", [False, True])
def test_trials_with_different_results_in_one_directory_stop_the_sweep(sweep, is_run_before):
    """Otherwise one of them would be taken for the other, which is done, and never run."""
    chosen = "hydra.sweep.subdir=${activation.name}"
    if is_run_before:
        assert sweep("seed=0", "activation=relu", chosen)[0] == 0
    status, _, err = sweep("seed=0,1", "activation=relu", chosen)
    assert status == 1
    assert "trials 0 (seed=0 activation=relu) and 1 (seed=1 activation=relu) would share" in err
    assert f"{FOLDER}/relu with different values of seed; nothing was started" in err
    assert "hydra.sweep.subdir" in err
    assert statuses() == ({0: "done"} if is_run_before else {})


def test_trials_with_the_same_result_in_a_chosen_directory_are_run_once(sweep):
    status, out, _ = sweep("seed=0", "threads=1,2", "hydra.sweep.subdir=${activation.name}")
    assert status == 0
    assert "2 trials, 1 new, 1 repeated; 1 to run" in out
    assert n_starts(0) == 1


def test_jobs_of_unknown_size_are_refused_before_their_launcher_is_built(sweep):
    status, _, err = sweep("seed=0", "hydra/launcher=slurm", "trainer.devices=auto")
    assert status == 1
    assert "must state its number of devices; got trainer.devices=auto" in err


class Returns(Launcher):
    """A launcher that returns the errors of trials, like that of submitit."""

    def setup(self, *, hydra_context, task_function, config) -> None: ...

    def launch(self, job_overrides, initial_job_idx):
        error = RuntimeError("no module named torch there")
        return [JobReturn(status=JobStatus.FAILED, _return_value=error) for _ in job_overrides]


class StartsNone(Launcher):
    """A launcher whose jobs end before their trials begin."""

    def setup(self, **given):
        pass

    def launch(self, job_overrides, initial_job_idx):
        return []


def test_a_job_that_ended_before_its_trial_began_is_reported(sweep, monkeypatch):
    monkeypatch.setattr(
        "hydra.core.plugins.Plugins.instantiate_launcher", lambda self, **given: StartsNone()
    )
    monkeypatch.setattr(
        "nerve.cli.sweep.slurm.SubmittedJobs.ended",
        lambda self, override: f"its job ended, with TIMEOUT ({override[:19]})",
    )
    _, _, err = sweep("seed=0,1", "hydra/launcher=basic", "hydra.launcher._target_=elsewhere")
    assert "0 (seed=0), 1 (seed=1): its job ended, with TIMEOUT (hydra.sweep.subdir" in err


def test_errors_that_trials_raised_elsewhere_are_reported(sweep, monkeypatch):
    name = "hydra_plugins.returns.Returns"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, Returns)
    status, _, err = sweep("seed=0", f"hydra.launcher._target_={name}")
    assert status == 1
    assert "0 (the only one): not started" in err
    assert "the launcher: no module named torch there" in err


class GivesUp(Launcher):
    """A launcher that raises an error, as that of submitit does when a job is killed."""

    received: list[list[str]]

    def setup(self, *, hydra_context, task_function, config) -> None: ...

    def launch(self, job_overrides, initial_job_idx):
        GivesUp.received += [list(overrides) for overrides in job_overrides]
        raise RuntimeError(f"job {initial_job_idx} is gone\nand this was its whole log")


def test_another_launcher_gets_the_remaining_trials_and_its_errors_lose_nothing(sweep, monkeypatch):
    assert sweep("seed=1")[0] == 0
    GivesUp.received = []
    name = "hydra_plugins.gives_up.GivesUp"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, GivesUp)
    where = [f"hydra.launcher._target_={name}", "hydra.sweeper.max_batch_size=1"]
    status, out, err = sweep("seed=0,1,2", *where)
    assert status == 1
    subdirs = [overrides.pop() for overrides in GivesUp.received]
    assert [overrides[0] for overrides in GivesUp.received] == ["seed=0", "seed=2"]
    assert all(re.fullmatch(r"hydra\.sweep\.subdir='[0-9a-f]{12}'", text) for text in subdirs)
    assert "1 seed=1 skipped done" in out
    assert "0 (seed=0), 2 (seed=2): not started" in err
    assert "the launcher: job 0 is gone" in err
    assert "whole log" not in err
    assert "the launcher: job 1 is gone" in err
    status, out, _ = sweep("seed=1", *where)
    assert status == 0
    records()[1].update(run_status="interrupted")
    as_an_earlier_version_left(1, "123456789abc")
    GivesUp.received = []
    assert sweep("seed=1", *where)[0] == 1
    assert GivesUp.received == [["seed=1", "hydra.sweep.subdir='123456789abc'"]]


class FindsARun(Launcher):
    """A launcher that puts the run in `other` into the directory of the trial."""

    def setup(self, *, hydra_context, task_function, config) -> None: ...

    def launch(self, job_overrides, initial_job_idx):
        shutil.copytree("other/chosen", "mine/chosen")
        raise RuntimeError("the job was killed")


@pytest.fixture
def finds_a_run(sweep, monkeypatch):
    """A sweep of one trial whose launcher is `FindsARun`, after one into `other`."""
    name = "hydra_plugins.finds_a_run.FindsARun"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, FindsARun)

    def call(first: list[str], second: list[str], between: Callable[[], None]):
        chosen = ["seed=3", "hydra.sweep.subdir=chosen"]
        assert sweep(*chosen, "hydra.sweep.dir=other", *first)[0] == 0
        between()
        return sweep(*chosen, "hydra.sweep.dir=mine", f"hydra.launcher._target_={name}", *second)

    return call


def test_a_run_with_other_values_that_came_first_is_not_taken_for_the_trial(finds_a_run):
    status, _, err = finds_a_run([], ["activation=relu"], lambda: None)
    assert status == 1
    assert "mine/chosen holds run" in err
    assert "Choose another directory with hydra.sweep.dir=…, or delete that one." in err
    assert "activation.name" in err


def test_values_that_depend_on_the_machine_may_differ_there(finds_a_run, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/there")
    place = ["data.corpus.roots=[${oc.env:SCRATCH}/code]"]
    status, out, err = finds_a_run(place, place, lambda: monkeypatch.setenv("SCRATCH", "/here"))
    assert status == 0, err
    assert "0 the only one run done" in out


def test_a_run_whose_node_was_lost_is_dead_despite_its_recent_heartbeat(finds_a_run):
    """This shows once the heartbeat is old: here, after two seconds."""

    def lose_the_node() -> None:
        beat = datetime.now(UTC) - FRESH + timedelta(seconds=2)
        record = RunRecord.load("other/chosen")
        heartbeat = beat.isoformat(timespec="seconds")
        record.update(run_status="running", host="elsewhere", heartbeat=heartbeat)

    status, _, err = finds_a_run([], [], lose_the_node)
    assert status == 1
    assert "0 (the only one): killed" in err


def test_a_directory_renamed_while_its_trial_ran_is_not_recreated(tmp_path):
    """However its process ended; the summary says why."""
    run = RunDirectory(tmp_path / "run")
    RunRecord.create(run.path, {"seed": 1})
    ended = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, process_group=0)
    process = object.__new__(local._Process)
    process.trial = Trial(0, [], OmegaConf.create(), run)
    process._popen = ended
    run.path.rename(tmp_path / "moved")
    process._settle()
    assert "run no longer exists: it was renamed or deleted" in process.trial.start_error
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
