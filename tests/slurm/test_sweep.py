"""A sweep on a real Slurm gets the launcher's values and leaves the same as a local sweep. Trials
that fail, are killed or canceled do not affect the others, and the repeated command runs what is
not done.
"""

import os
import re
import signal

import pytest
from support import composed

from nerve.cli.config.compose import identity
from nerve.storage.directory import RunDirectory

from .sweep import TINY

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

CPUS = 2  # of the three that a node has: no two jobs share one
KILLED, CANCELLED, UNDISTURBED, UNLUCKY, WITHDRAWN, ADDED = range(6)
COMMAND = [
    "seed=0,1,2,3,4",
    "hydra.launcher.partition=spare",
    "hydra.launcher.account=physics",
    "hydra.launcher.qos=patient",
    "hydra.launcher.constraint=fast",
    "hydra.launcher.timeout_min=7",
    "hydra.launcher.mem_gb=2",
    f"hydra.launcher.cpus_per_task={CPUS}",
    "hydra.launcher.gpus_per_node=1",
    "hydra.launcher.array_parallelism=3",
    "hydra.launcher.signal_delay_s=77",
    "hydra.launcher.name=spectra",
    "hydra.launcher.setup=['echo set up on $SLURMD_NODENAME']",
    "+hydra.launcher.additional_parameters.comment=mine",
]
"""With every value of the launcher that Slurm can tell again; more trials than there are nodes."""

AGAIN = ["+hydra.launcher.additional_parameters.clusters=nerve"]
"""What the repeated command is given beside it."""


@pytest.fixture(scope="module")
def sweep(cluster, new_sweep, local):
    """One trial completes; one is killed as if for lack of memory, one is canceled, one raises an
    error, and one is canceled while it is pending with others, which SLURM then forgets.
    """
    sent = new_sweep("sweep")
    cluster.call("sacctmgr", "-i", "add", "account", "physics")
    cluster.call("sacctmgr", "-i", "add", "qos", "patient")
    cluster.call("sacctmgr", "-i", "add", "user", cluster.user, "account=physics", "qos=patient")
    sent.send(*COMMAND, sent.brake(unlucky=UNLUCKY))
    killed = sent.wait_for_start(KILLED)
    cluster.call("scancel", f"{killed.job.partition('_')[0]}_{WITHDRAWN}")
    os.kill(killed.pid, signal.SIGKILL)
    cluster.call("scancel", sent.wait_for_start(CANCELLED).job)
    sent.wait_for_start(UNDISTURBED)
    sent.wait_for_start(UNLUCKY)
    sent.release()
    return sent


@pytest.fixture(scope="module")
def status(sweep):
    return sweep.finish()


@pytest.fixture(scope="module")
def script(sweep, status):
    """What sbatch got: one script, because the trials of a sweep are one array."""
    (text,) = [path.read_text() for path in sweep.folder.glob("outputs/multirun/.submitit/*/*.sh")]
    return text


@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (KILLED, "killed"),
        (CANCELLED, "interrupted: stopped by SIGTERM"),
        (UNLUCKY, "failed: RuntimeError: this run has no luck"),
        (WITHDRAWN, "not started"),
    ],
)
def test_the_launcher_returns_and_names_every_trial_that_is_not_done(sweep, status, seed, why):
    assert status == 1, sweep.everything
    assert "4 of 5 trials" in sweep.output
    assert f"  {seed} (seed={seed}): {why}\n" in sweep.output


def test_the_rows_of_the_others_equal_those_of_a_local_run(sweep, status, assert_same_rows):
    record = sweep.records()[UNDISTURBED]
    assert (record.run_status, record.restarts, record.sweep) == ("done", 0, "multirun")
    assert_same_rows(sweep, UNDISTURBED)


def test_each_record_states_how_its_run_ended(sweep, status):
    records = sweep.records()
    assert records[CANCELLED].run_status == "interrupted"
    assert records[UNLUCKY].run_status == "failed"
    assert records[UNLUCKY].error == {"type": "RuntimeError", "message": "this run has no luck"}
    assert RunDirectory(records[KILLED].directory).state == "dead"


def test_a_trial_is_in_the_directory_that_a_local_sweep_gives_it(sweep, status, local):
    """Named by its id: a sweep started on one machine can be completed on the other."""
    for where, brake in ((sweep, [sweep.brake(unlucky=UNLUCKY)]), (local, [])):
        records = where.records()
        assert sorted(records) == [0, 1, 2, 3]
        for seed, record in records.items():
            name = identity(composed(*TINY, f"seed={seed}", *brake))
            assert record.directory == where.folder / "outputs" / "multirun" / name


def test_the_record_names_the_job(sweep, status):
    jobs = [record.job for record in sweep.records().values()]
    assert {job["scheduler"] for job in jobs} == {"slurm"}
    assert len({job["array_id"] for job in jobs}) == 1
    assert {job["array_task"] for job in jobs} == {"0", "1", "2", "3"}


def test_the_values_of_the_launcher_reach_slurm(cluster, sweep, script):
    job = cluster.job(sweep.records()[UNDISTURBED].job["id"])
    asked = {
        "JobName": "spectra",
        "Partition": "spare",
        "Account": "physics",
        "QOS": "patient",
        "Features": "fast",
        "TimeLimit": "00:07:00",
        "MinMemoryNode": "2G",
        "CPUs/Task": str(CPUS),
        "NumTasks": "1",
        "TresPerNode": "gres:gpu:1",
        "ArrayTaskThrottle": "3",
        "Comment": "mine",
        "Requeue": "1",
    }
    assert {name: job.get(name) for name in asked} == asked
    assert "--signal=USR2@77" in script


def test_the_lines_of_setup_run_first_on_the_node(sweep, status):
    logs = sweep.logs()
    assert len(logs) == 4
    assert {re.match(r"set up on (n\d)\n", log)[1] for log in logs} <= {"n0", "n1"}


def test_the_process_gets_the_cpus_of_its_job(cluster, sweep, status):
    """srun does not inherit --cpus-per-task from sbatch, and would use only one."""
    job = sweep.records()[UNDISTURBED].job
    step = f"{job['array_id']}_{job['array_task']}.0"
    given = cluster.call("sacct", "-n", "-P", "-j", step, "-o", "AllocCPUS")
    assert given.split() == [str(CPUS)]


@pytest.fixture(scope="module")
def sent_again(cluster, sweep, status):
    """The repeated command, which is killed while one of its runs is being canceled, one is running
    and one is queued, for the third that a node lacks; and what it said."""
    sweep.hold()
    sweep.send(*COMMAND, *AGAIN, sweep.brake(unlucky=UNLUCKY))
    sweep.wait_for_start(KILLED, number=2)
    cluster.call("scancel", sweep.wait_for_start(CANCELLED, number=2).job)
    said = sweep.output
    sweep.abandon()
    return said


@pytest.fixture(scope="module")
def completed(cluster, sweep, sent_again):
    """The command once more, with one more run."""
    sweep.send(*COMMAND, f"seed=0,1,2,3,4,{ADDED}", *AGAIN, sweep.brake(unlucky=UNLUCKY))
    cluster.wait("the command", lambda: "also waiting for" in sweep.output)
    sweep.release()
    sweep.finish()
    return sweep


def test_a_repeated_command_submits_only_the_remaining_trials(sent_again, completed):
    assert "1 killed, 1 interrupted, 1 done, 1 failed, 1 new; 3 to run" in sent_again
    scripts = completed.folder.glob("outputs/multirun/.submitit/*/*.sh")
    sizes = sorted(re.search(r"--array=0-(\d)", path.read_text())[1] for path in scripts)
    assert sizes == ["1", "2", "4"]  # the last index of each array
    assert completed.records()[ADDED].run_status == "done"


def test_it_waits_for_queued_and_running_trials_and_submits_none_twice(completed):
    summary = "6 trials, 2 submitted before, 1 interrupted, 1 done, 1 failed, 1 new; 2 to run"
    assert summary in completed.output
    assert re.search(r"also waiting for \d+_0, \d+_2", completed.output)
    deeds = re.findall("waited for|resumed|run(?= +│ done)", completed.output)
    assert deeds == ["waited for", "resumed", "waited for", "run"]
    assert completed.records()[WITHDRAWN].run_status == "done"
    sent = completed.folder.glob("outputs/multirun/.submitit/*/*_submitted.pkl")
    assert len(list(sent)) == 5 + 3 + 2


@pytest.mark.parametrize(("seed", "restarts"), [(KILLED, 1), (CANCELLED, 2), (WITHDRAWN, 0)])
def test_each_trial_is_resumed_as_often_as_it_was_stopped(completed, seed, restarts):
    record = completed.records()[seed]
    assert (record.run_status, record.restarts) == ("done", restarts)
    assert [start.step >= 20 for start in completed.starts(seed)] == [False, *[True] * restarts]


@pytest.mark.parametrize("seed", [KILLED, CANCELLED])
def test_killed_and_canceled_runs_end_like_undisturbed_ones(completed, seed, assert_same_rows):
    assert_same_rows(completed, seed)


def test_a_repeated_command_leaves_failed_trials_alone(completed):
    assert completed.records()[UNLUCKY].restarts == 0
    assert len(completed.starts(UNLUCKY)) == 1
