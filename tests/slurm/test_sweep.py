"""A sweep on a real Slurm gets the launcher's values and leaves what a local sweep leaves."""

import re

import pytest

pytestmark = pytest.mark.slurm

CPUS = 2  # of the three that a node has: no two jobs share one


@pytest.fixture(scope="module")
def sweep(cluster, new_sweep, local):
    """Four trials on two nodes, with every value of the launcher that Slurm can tell again."""
    sent = new_sweep("sweep")
    cluster.call("sacctmgr", "-i", "add", "account", "physics")
    cluster.call("sacctmgr", "-i", "add", "qos", "patient")
    cluster.call("sacctmgr", "-i", "add", "user", cluster.user, "account=physics", "qos=patient")
    sent.send(
        "seed=0,1,2,3",
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
    )
    assert sent.finish() == 0, sent.everything
    return sent


@pytest.fixture(scope="module")
def script(sweep):
    """What was handed to sbatch: once, as the trials of a sweep are one array."""
    (text,) = [path.read_text() for path in sweep.folder.glob("outputs/multirun/.submitit/*/*.sh")]
    return text


def test_an_array_wider_than_the_nodes_runs_every_trial(sweep):
    records = sweep.records()
    assert sorted(records) == [0, 1, 2, 3]
    assert {record.run_status for record in records.values()} == {"done"}
    assert {record.sweep for record in records.values()} == {"multirun"}
    assert {record.restarts for record in records.values()} == {0}


def test_the_rows_are_those_of_a_local_run(sweep, assert_same_rows):
    for seed in range(4):
        assert_same_rows(sweep, seed)


def test_a_trial_is_in_the_directory_that_a_local_sweep_would_give_it(sweep, local):
    """One config_id: a sweep that was begun on one machine can be finished on the other."""
    names = [
        {record.directory.relative_to(which.folder) for record in which.records().values()}
        for which in (sweep, local)
    ]
    assert names[0] == names[1]


def test_the_record_names_the_job(sweep):
    jobs = [record.job for record in sweep.records().values()]
    assert {job["scheduler"] for job in jobs} == {"slurm"}
    assert len({job["array_id"] for job in jobs}) == 1
    assert {job["array_task"] for job in jobs} == {"0", "1", "2", "3"}


def test_the_values_of_the_launcher_reach_slurm(cluster, sweep, script):
    job = cluster.job(sweep.records()[2].job["id"])
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


def test_the_lines_of_setup_run_first_on_the_node(sweep):
    logs = sweep.logs()
    assert len(logs) == 4
    assert {re.match(r"set up on (n\d)\n", log)[1] for log in logs} <= {"n0", "n1"}


def test_the_process_gets_the_cpus_that_the_job_was_given(cluster, sweep):
    """srun does not take --cpus-per-task over from sbatch, and would leave all but one idle."""
    job = sweep.records()[0].job
    step = f"{job['array_id']}_{job['array_task']}.0"
    given = cluster.call("sacct", "-n", "-P", "-j", step, "-o", "AllocCPUS")
    assert given.split() == [str(CPUS)]
