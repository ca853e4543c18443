"""Trials that raise, are killed or cancelled on a real Slurm: the others are kept, and the same
command goes on with what is not done.
"""

import os
import re
import signal

import pytest

from nerve.storage.directory import RunDirectory

pytestmark = pytest.mark.slurm

KILLED, CANCELLED, UNLUCKY, UNDISTURBED, WITHDRAWN, WAITING = range(6)
GRID = "seed=0,1,2,3,4,5"


@pytest.fixture(scope="module")
def sweep(cluster, new_sweep, local):
    """Two trials end; one is killed as by a lack of memory, one is cancelled, one raises, and one
    is cancelled while another waits with it: SLURM then keeps nothing of it.
    """
    sent = new_sweep("mishaps")
    sent.send(GRID, sent.brake(unlucky=UNLUCKY), "hydra.launcher.array_parallelism=4")
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


@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (KILLED, "killed"),
        (CANCELLED, "interrupted: Interrupted: stopped by SIGTERM"),
        (UNLUCKY, "failed: RuntimeError: this run has no luck"),
        (WITHDRAWN, "not started"),
    ],
)
def test_the_launcher_returns_and_names_every_trial_that_is_not_done(sweep, status, seed, why):
    assert status == 1, sweep.everything
    assert "4 of 6 trials" in sweep.output
    assert f"  {seed} (seed={seed}): {why}\n" in sweep.output


def test_the_others_are_kept(sweep, status, assert_same_rows):
    assert sweep.records()[UNDISTURBED].run_status == "done"
    assert sweep.records()[WAITING].run_status == "done"
    assert_same_rows(sweep, UNDISTURBED)


def test_each_record_says_how_its_run_ended(sweep, status):
    records = sweep.records()
    assert records[CANCELLED].run_status == "interrupted"
    assert records[UNLUCKY].run_status == "failed"
    assert records[UNLUCKY].error == {"type": "RuntimeError", "message": "this run has no luck"}
    assert RunDirectory(records[KILLED].directory).state == "dead"


@pytest.fixture(scope="module")
def sent_again(sweep, status):
    """The same command."""
    sweep.send(GRID, sweep.brake(unlucky=UNLUCKY))
    sweep.finish()
    return sweep


@pytest.mark.parametrize("seed", [KILLED, CANCELLED])
def test_sent_again_a_killed_or_cancelled_run_ends_as_if_nothing_had_been(
    sent_again, seed, assert_same_rows
):
    record = sent_again.records()[seed]
    assert (record.run_status, record.restarts) == ("done", 1)
    assert [start.step >= 20 for start in sent_again.starts(seed)] == [False, True]
    assert_same_rows(sent_again, seed)


def test_sent_again_only_what_is_left_to_do_is_queued(sent_again):
    scripts = sent_again.folder.glob("outputs/multirun/.submitit/*/*.sh")
    sizes = sorted(re.search(r"--array=0-(\d)", path.read_text())[1] for path in scripts)
    assert sizes == ["2", "5"]  # the last index of each array
    assert "1 killed, 1 interrupted, 1 failed, 2 done, 1 new; 3 to run" in sent_again.output


def test_sent_again_what_failed_is_left_as_it_is(sent_again):
    assert sent_again.records()[UNLUCKY].restarts == 0
    assert len(sent_again.starts(UNLUCKY)) == 1
