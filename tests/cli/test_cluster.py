"""Jobs that submitit has sent, found again by the files that it keeps of each."""

from pathlib import Path

import pytest
import submitit

from nerve.cli.cluster import SUBMITIT_SLURM, SentJobs


@pytest.fixture
def waited_for(monkeypatch) -> list[tuple]:
    """The jobs that submitit was asked to wait for."""
    asked = []

    def wait(job: submitit.SlurmJob) -> None:
        asked.append((str(job.paths._folder), job.job_id, job.num_tasks))

    monkeypatch.setattr(submitit.SlurmJob, "wait", wait)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", submitit.SlurmJob.watcher)
    return asked


def send(folder: Path, job_id: str) -> None:
    path = folder / ".submitit" / job_id / f"{job_id}_submitted.pkl"
    path.parent.mkdir(parents=True)
    path.touch()


def test_only_what_was_sent_since_is_waited_for(waited_for, tmp_path):
    folder = str(tmp_path / ".submitit" / "%j")
    launcher = {"_target_": SUBMITIT_SLURM, "submitit_folder": folder}
    send(tmp_path, "7_0")
    jobs = SentJobs(launcher | {"nodes": 2, "tasks_per_node": 2})
    send(tmp_path, "8_0")
    send(tmp_path, "8_1")
    jobs.wait()
    assert waited_for == [(folder, "8_0", 4), (folder, "8_1", 4)]


def test_other_launchers_are_not_followed(waited_for):
    SentJobs({"_target_": "hydra_plugins.ray.RayLauncher"}).wait()
    assert waited_for == []
