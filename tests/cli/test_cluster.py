"""Jobs that submitit has sent, found again by its files and by what `squeue` says of them."""

import os
from pathlib import Path

import pytest
import submitit
from submitit.core.utils import DelayedSubmission

from nerve.cli.cluster import SUBMITIT_SLURM, SentJobs
from nerve.errors import NerveError


def launcher(folder: Path) -> dict[str, object]:
    files = str(folder / ".submitit" / "%j")
    return {"_target_": SUBMITIT_SLURM, "submitit_folder": files}


def send(folder: Path, job_id: str, *overrides: str) -> Path:
    path = folder / ".submitit" / job_id / f"{job_id}_submitted.pkl"
    path.parent.mkdir(parents=True)
    DelayedSubmission(print, list(overrides), "hydra.sweep.dir", 0).dump(path)
    return path


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Sets what `squeue` prints: a line each time that it is asked, the last one from then on."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", submitit.SlurmJob.watcher)
    script, answers, calls = (tmp_path / name for name in ("squeue", "answers", "calls"))
    script.write_text(
        f'#!/bin/sh\necho "$@ $SQUEUE_PARTITION" >> {calls}\n'
        f"answer=$(head -1 {answers})\n"
        f"[ $(wc -l < {answers}) -gt 1 ] && sed -i 1d {answers}\n"
        'case "$answer" in no*) echo "$answer" >&2; exit 1;; esac\n'
        "printf '%s\\n' $answer\n"
    )
    script.chmod(0o755)

    def answer(*lines: str) -> Path:
        answers.write_text("".join(f"{line}\n" for line in lines))
        return calls

    return answer


def place(number: int) -> str:
    return f"hydra.sweep.subdir=run{number}"


@pytest.fixture
def jobs(tmp_path, queue):
    """Three tasks of an array and a job of its own, which have been sent."""
    for number, job_id in enumerate(["7_0", "7_1", "7_2", "9"]):
        send(tmp_path, job_id, "activation=gelu", place(number))
    return SentJobs(launcher(tmp_path))


def test_open_are_those_in_the_queue(jobs, queue):
    queue("7_0 7_2 9 10_0")
    queued = jobs.open()
    assert {override: queued.get(override) for override in map(place, range(4))} == {
        place(0): "7_0",
        place(1): None,
        place(2): "7_2",
        place(3): "9",
    }


def test_what_is_sent_later_is_known_too(jobs, queue, tmp_path):
    queue("7_0 11_0")
    assert place(5) not in jobs.open()
    send(tmp_path, "11_0", place(5))
    assert jobs.open()[place(5)] == "11_0"


def test_only_the_jobs_that_are_meant_are_waited_for_until_the_queue_has_none(
    jobs, queue, monkeypatch
):
    """While it does not answer they may be there."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    calls = queue("7_0 7_1 9", "no answer", "7_0 9", "9")
    jobs.wait({place(0), place(1)})
    assert len(calls.read_text().splitlines()) == 4


def test_nothing_is_waited_for_without_a_job(jobs, queue):
    calls = queue("7_0")
    jobs.wait(set())
    assert not calls.exists()


def test_a_job_whose_overrides_cannot_be_read_is_not_known(tmp_path, queue):
    queue("7_0 7_1")
    send(tmp_path, "7_0", place(0)).write_bytes(b"damaged")
    send(tmp_path, "7_1", place(1))
    assert SentJobs(launcher(tmp_path)).open() == {place(1): "7_1"}


def test_without_an_answer_of_the_queue_nothing_is_sent(jobs, queue):
    queue("no socket")
    with pytest.raises(NerveError, match=r"squeue says: no socket\. Nothing was sent"):
        jobs.open()


def test_the_queue_is_not_asked_before_anything_was_sent(tmp_path, queue):
    queue("no socket")
    assert SentJobs(launcher(tmp_path)).open() == {}


def test_the_users_filters_of_squeue_do_not_hide_jobs(jobs, queue, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    calls = queue("7_0")
    jobs.open()
    (asked,) = calls.read_text().splitlines()
    assert "gpu" not in asked
    assert "--all" in asked


def test_submitit_takes_a_job_for_ended_once_the_queue_does_not_have_it(jobs, queue, tmp_path):
    """Also if nothing was ever heard of it."""
    queue("7_0", "no answer", "7_0", "9")
    folder = launcher(tmp_path)["submitit_folder"]
    first, second = (submitit.SlurmJob(folder, job_id) for job_id in ("7_0", "7_1"))
    assert (first.done(), second.done()) == (False, True)
    first.watcher.update()  # no answer
    assert not first.done()
    first.watcher.update()
    assert not first.done()
    first.watcher.update()
    assert first.done()


def test_the_jobs_of_other_launchers_are_not_known(queue):
    calls = queue("7_0")
    jobs = SentJobs({"_target_": "hydra_plugins.ray.RayLauncher"})
    assert jobs.open() == {}
    jobs.wait({place(0)})
    assert not calls.exists()
