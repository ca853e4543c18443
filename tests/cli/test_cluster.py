"""Jobs that submitit has sent, found again by the files that it keeps of each."""

import os
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import DelayedSubmission

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


def launcher(folder: Path) -> dict[str, object]:
    files = str(folder / ".submitit" / "%j")
    return {
        "_target_": SUBMITIT_SLURM,
        "submitit_folder": files,
        "nodes": 2,
        "tasks_per_node": 2,
    }


def send(folder: Path, job_id: str, *overrides: str) -> Path:
    path = folder / ".submitit" / job_id / f"{job_id}_submitted.pkl"
    path.parent.mkdir(parents=True)
    DelayedSubmission(print, list(overrides), "hydra.sweep.dir", 0).dump(path)
    return path


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Sets what `squeue` prints, and its exit status."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def answer(text: str, status: int = 0) -> None:
        (tmp_path / "squeue").write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
        (tmp_path / "squeue").chmod(0o755)

    return answer


def test_only_what_was_sent_since_is_waited_for(waited_for, tmp_path, queue):
    queue("7_0\\n")
    send(tmp_path, "7_0")
    jobs = SentJobs(launcher(tmp_path))
    send(tmp_path, "8_0")
    send(tmp_path, "8_1")
    jobs.wait()
    folder = launcher(tmp_path)["submitit_folder"]
    assert waited_for == [(folder, "8_0", 4), (folder, "8_1", 4)]


def test_of_what_was_sent_before_the_queued_jobs_that_are_asked_for_are_followed(
    waited_for, tmp_path, queue
):
    queue("7_0\\n7_2\\n9\\n")
    for number in range(3):
        send(tmp_path, f"7_{number}", "activation=gelu", f"hydra.sweep.subdir=run{number}")
    jobs = SentJobs(launcher(tmp_path))
    assert jobs.follow("hydra.sweep.subdir=run0")
    assert not jobs.follow("hydra.sweep.subdir=run1")  # has ended
    jobs.wait()
    assert [job_id for _, job_id, _ in waited_for] == ["7_0"]


def test_a_job_whose_overrides_cannot_be_read_is_not_followed(waited_for, tmp_path, queue):
    queue("7_0\\n7_1\\n")
    send(tmp_path, "7_0", "hydra.sweep.subdir=run0").write_bytes(b"damaged")
    send(tmp_path, "7_1", "hydra.sweep.subdir=run1")
    jobs = SentJobs(launcher(tmp_path))
    assert not jobs.follow("hydra.sweep.subdir=run0")
    assert jobs.follow("hydra.sweep.subdir=run1")


def test_nothing_is_followed_while_the_queue_does_not_answer(waited_for, tmp_path, queue):
    queue("7_0\\n", status=1)
    send(tmp_path, "7_0", "hydra.sweep.subdir=run0")
    assert not SentJobs(launcher(tmp_path)).follow("hydra.sweep.subdir=run0")


@pytest.mark.parametrize(("in_queue", "status"), [("7_0\\n", 0), ("", 1)])
def test_what_the_accounting_forgets_is_not_cancelled_if_the_queue_may_have_it(
    waited_for, tmp_path, queue, in_queue, status
):
    """Two tasks wait; then the accounting has one."""
    SentJobs(launcher(tmp_path))
    watcher = submitit.SlurmJob.watcher
    watcher._info_dict = watcher.read_info("JobID|State\n7_[0-1]|PENDING")
    queue(in_queue, status)
    assert watcher.read_info("JobID|State\n7_[1]|PENDING").keys() == {"7_1"}
    queue("7_1\\n")
    assert watcher.read_info("JobID|State\n7_[1]|PENDING")["7_0"]["State"] == "CANCELLED"


def test_other_launchers_are_not_followed(waited_for):
    SentJobs({"_target_": "hydra_plugins.ray.RayLauncher"}).wait()
    assert waited_for == []
