"""Runs that Slurm removes from their nodes (preempted, requeued, timed out) come back."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from .sweep import STEPS

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

WARNED_S = 90


@pytest.fixture(scope="module")
def out_of_time(cluster, new_sweep, local):
    """A run that times out twice but may do so once; meanwhile the others continue."""
    sweep = new_sweep("time")
    where = "hydra.launcher.partition=apart"
    warning = f"hydra.launcher.signal_delay_s={WARNED_S}"
    sweep.send("seed=0", sweep.brake(), where, warning, "hydra.launcher.max_num_timeout=1")
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield pool.submit(_let_run_out_of_time, cluster, sweep)


def _let_run_out_of_time(cluster, sweep):
    """Shortens the limit of the job each time that it trains, however long it took to start.

    Slurm checks time limits every half minute, and sends a warning early if the next check would be
    too late: with the limit in less than two minutes, and WARNED_S of 90 s, at the next check.
    """
    job = sweep.wait_for_start(0).job
    _set_limit(cluster, job, _minutes_so_far(cluster, job) + 2)
    cluster.wait("the requeue", lambda: cluster.job(job)["Restarts"] == "1")
    _set_limit(cluster, job, 10)
    sweep.wait_for_start(0, number=2)
    _set_limit(cluster, job, _minutes_so_far(cluster, job) + 2)
    return sweep


def _set_limit(cluster, job, minutes):
    cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")


def _minutes_so_far(cluster, job):
    hours, minutes, _ = map(int, cluster.job(job)["RunTime"].split(":"))
    return 60 * hours + minutes


@pytest.fixture(scope="module")
def taken_away(cluster, new_sweep, local, out_of_time):
    """Seed 0 on its own node is requeued; on the other one, preemption kills seed 1 at once and
    warns seed 2.
    """
    sweeps = {}
    for seed, (partition, other_node) in enumerate(
        (("main", "n1"), ("spare", "n0"), ("graceful", "n0"))
    ):
        sweep = sweeps[seed] = new_sweep(partition)
        where = [f"hydra.launcher.partition={partition}", f"hydra.launcher.exclude={other_node}"]
        sweep.send(f"seed={seed}", sweep.brake(), *where)
    first = [sweep.wait_for_start(seed) for seed, sweep in sweeps.items()]
    cluster.call("scontrol", "requeue", first[0].job)
    node = ["--nodelist=n1", "--exclusive", "--output=/dev/null"]
    cluster.call("sbatch", "--partition=main", *node, "--wrap=sleep 1")
    for seed, sweep in sweeps.items():
        sweep.wait_for_start(seed, number=2)
    for sweep in sweeps.values():
        sweep.release()
    for sweep in sweeps.values():
        assert sweep.finish() == 0, sweep.everything
    return sweeps


@pytest.mark.parametrize("seed", range(3))
def test_a_requeued_or_preempted_run_ends_like_an_undisturbed_one(
    taken_away, seed, assert_same_rows
):
    record = taken_away[seed].records()[seed]
    assert (record.run_status, record.step) == ("done", STEPS)
    assert_same_rows(taken_away[seed], seed)


@pytest.mark.parametrize("seed", range(3))
def test_it_resumes_where_it_was_in_the_same_directory_and_job(taken_away, seed):
    sweep = taken_away[seed]
    first, second = sweep.starts(seed)
    assert first.step == 0
    assert second.step > 20, "it had saved when it was told to go; the last regular time at 20"
    assert second.job == first.job
    record = sweep.records()[seed]
    assert record.restarts == 1
    assert record.job["restarts"] == "1"
    runs = sweep.folder.glob("outputs/multirun/*/run.json")
    assert len(list(runs)) == len(sweep.records())


def test_at_the_time_limit_a_run_is_requeued_as_often_as_allowed(cluster, out_of_time):
    sweep = out_of_time.result()
    assert sweep.finish() == 1
    assert "Job not requeued because: timed-out too many times." in sweep.logs()[0]
    first, second = sweep.starts(0)
    assert second.job == first.job
    assert second.step > 20, "it had saved when it was warned"
    record = sweep.records()[0]
    assert (record.run_status, record.restarts) == ("interrupted", 1)
    assert record.step < STEPS
    state = cluster.wait("the end of the job", lambda: _ended(cluster.job(first.job)["JobState"]))
    assert state == "COMPLETED", "it is not queued again"


def test_a_repeated_command_completes_it_as_if_it_had_had_the_time(out_of_time, assert_same_rows):
    sweep = out_of_time.result()
    last = sweep.starts(0)[-1]
    sweep.release()
    sweep.send("seed=0", sweep.brake())
    assert sweep.finish() == 0, sweep.everything
    record = sweep.records()[0]
    assert (record.run_status, record.restarts) == ("done", 2)
    assert sweep.starts(0)[-1].step > last.step
    assert_same_rows(sweep, 0)


def _ended(state: str) -> str | None:
    return None if state in ("RUNNING", "COMPLETING") else state
