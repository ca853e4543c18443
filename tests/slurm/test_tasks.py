"""One run with several processes: Slurm starts one per device, and all of them come back."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

NUMBERS = ["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "val_loss"]


@pytest.fixture(scope="module")
def sweep(cluster, new_sweep, local):
    """Two processes on one node, which are asked to save and come back."""
    sent = new_sweep("tasks")
    sent.send(
        "seed=0",
        sent.brake(),
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.devices=2",
        "hydra.launcher.partition=apart",
        "hydra.launcher.setup=['export MASTER_ADDR=127.0.0.1']",  # no one knows a host named n2
    )
    cluster.call("scancel", "--signal=USR2", sent.wait_for_start(0).job)
    sent.wait_for_start(0, number=2)
    sent.release()
    assert sent.finish() == 0, sent.everything
    return sent


def test_there_is_one_process_per_device(cluster, sweep):
    record = sweep.records()[0]
    assert cluster.job(record.job["id"])["NumTasks"] == "2"
    assert record.config["trainer"]["devices"] == 2


def test_the_run_resumes_where_it_was(sweep):
    record = sweep.records()[0]
    assert (record.run_status, record.restarts) == ("done", 1)
    assert sweep.starts(0)[1].step > 20


def test_the_rows_equal_those_of_one_process(sweep, local):
    """float32 gradients are summed in another order, and training amplifies the difference."""
    metrics, expected = sweep.rows(0)[0], local.rows(0)[0]
    assert metrics.step.tolist() == expected.step.tolist()
    np.testing.assert_allclose(metrics[NUMBERS], expected[NUMBERS], rtol=1e-3)
