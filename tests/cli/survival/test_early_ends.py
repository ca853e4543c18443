"""A run that ends early without an error is either done or to be resumed."""

import os

import lightning as L
import pytest
from processes import ended, nerve_run

import nerve
from nerve.cli.experiment.summary import warning_of
from nerve.cli.status import status_of
from nerve.errors import MeasurementError
from nerve.storage.record import RunRecord
from nerve.training.signals import Interrupted

MAX_TIME = ["+trainer.max_time=00:00:00:00"]
TIMER = [
    "+callbacks.clock._target_=lightning.pytorch.callbacks.Timer",
    "+callbacks.clock.duration=00:00:00:00",
]


@pytest.mark.parametrize("limit", [MAX_TIME, TIMER], ids=["max_time", "Timer"])
def test_a_run_that_reached_its_time_limit_is_resumed(experiment, assert_same, tmp_path, limit):
    """With no time at all, each start does one step; the rows equal those of an undisturbed run."""
    experiment("whole")
    for restarts in range(4):
        with pytest.raises(Interrupted, match=r"the 0 s of trainer\.max_time are over"):
            experiment("pieces", *limit)
        record = RunRecord.load(tmp_path / "pieces")
        assert (record.run_status, record.step) == ("interrupted", restarts + 1)
    experiment("pieces", *limit)
    assert RunRecord.load(tmp_path / "pieces").run_status == "done"
    assert_same("whole", "pieces")


def test_early_stopping_ends_a_run_as_done_and_is_recorded(experiment, tmp_path):
    stop = "+callbacks.stop._target_=lightning.pytorch.callbacks.EarlyStopping"
    rule = ["+callbacks.stop.monitor=val_loss", "+callbacks.stop.stopping_threshold=100"]
    experiment("run", stop, *rule)
    record = RunRecord.load(tmp_path / "run")
    assert (record.run_status, record.step) == ("done", 2)
    assert "val_loss" in (record.stopped_by or "")


class StopOnce(L.Callback):
    """Makes training stop without a recorded reason."""

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 3


def test_a_run_that_was_ended_early_without_a_reason_is_not_done(experiment, tmp_path):
    stop = [f"+callbacks.stop._target_={__name__}.StopOnce"]
    with pytest.raises(Interrupted, match="something else ended training at step 3 of 5"):
        experiment("run", *stop)
    record = RunRecord.load(tmp_path / "run")
    assert (record.run_status, record.step) == ("interrupted", 3)
    experiment("run", *stop)
    record = RunRecord.load(tmp_path / "run")
    assert (record.run_status, record.step, record.stopped_by) == ("done", 5, None)


def test_a_run_that_validated_on_part_of_the_data_is_not_done(experiment, tmp_path, monkeypatch):
    """For any limit on the batches."""
    monkeypatch.setattr("nerve.data.batches.HeldOutBatches.__len__", lambda self: 1)
    with pytest.raises(MeasurementError, match=r"1,024 targets; the last validation saw 64\."):
        experiment("run", "monitor.n_tokens=1024")
    assert RunRecord.load(tmp_path / "run").run_status == "failed"
    assert len(nerve.load_metrics(tmp_path / "run"))


TASKS = {
    "a task of srun": {"SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"},
    "no tasks per node": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "torchrun's variables": {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"},
}


@pytest.mark.parametrize("variables", TASKS.values(), ids=TASKS)
def test_a_run_on_one_device_is_complete_in_any_task_of_a_job(small, tmp_path, variables):
    """In its own process, whose rank comes from environment variables."""
    job = {"SLURM_JOB_NAME": "a", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
    environment, log = {**os.environ, **job, **variables}, tmp_path / "log"
    process = nerve_run(
        [*small, "hydra.run.dir=run"], cwd=tmp_path, log=log, environment=environment
    )
    assert ended(process) == 0, log.read_text()
    assert RunRecord.load(tmp_path / "run").run_status == "done"
    assert nerve.load_metrics(tmp_path / "run").step.max() == 5


def test_a_run_that_learned_nothing_has_a_warning(experiment, tmp_path, capsys):
    """A finite loss, however absurd: done, with a warning in its record, its summary and the
    command that lists runs. One that learned has none, nor one of images."""
    experiment("absurd", "optimizer=sgd", "optimizer.lr=1e-9")
    record = RunRecord.load(tmp_path / "absurd")
    assert record.run_status == "done"
    assert (record.warning or "").startswith("untrained: the loss of")
    assert f"warning: {record.warning}"[:60] in capsys.readouterr().out
    assert status_of(tmp_path / "absurd").reason == record.warning
    assert warning_of(4.1, 4.2) is None
    assert warning_of(4.1, None) is None
