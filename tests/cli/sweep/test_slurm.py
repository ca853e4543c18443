"""Jobs that submitit has submitted, known from the files next to its own and from `squeue`."""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import submitit
from submitit.slurm.slurm import SlurmExecutor

from nerve.cli.config.compose import SUBMITIT_SLURM
from nerve.cli.sweep.slurm import SubmittedJobs
from nerve.errors import NerveError

PROCESS = SlurmExecutor._internal_process_submissions


def launcher(folder: Path, **more: object) -> dict[str, object]:
    return {
        "_target_": SUBMITIT_SLURM,
        "submitit_folder": str(folder / ".submitit" / "%j"),
        **more,
    }


def send(folder: Path, job_id: str, *overrides: str, sweep: Path | None = None) -> Path:
    path = folder / ".submitit" / job_id / f"{job_id}_nerve.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"folder": str(sweep or folder), "overrides": overrides}))
    return path


@pytest.fixture
def queue(monkeypatch, tmp_path):
    """Sets what `squeue` prints: ids, states and reasons, as in `7:PD:job+held`. Each query gets
    the next answer, and the last one is repeated.
    """
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(submitit.SlurmJob, "watcher", submitit.SlurmJob.watcher)
    monkeypatch.setattr(SlurmExecutor, "_internal_process_submissions", PROCESS)
    script, answers, calls = (tmp_path / name for name in ("squeue", "answers", "calls"))
    script.write_text(
        f'#!/bin/sh\necho "$@ $SQUEUE_PARTITION" >> {calls}\n'
        f"answer=$(head -1 {answers})\n"
        f"[ $(wc -l < {answers}) -gt 1 ] && sed -i 1d {answers}\n"
        'case "$answer" in no*) echo "$answer" >&2; exit 1;; esac\n'
        'for job in $answer; do echo "$job" | tr ":+" "  "; done\n'
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
    """Three tasks of an array and a single job, all submitted."""
    for number, job_id in enumerate(["7_0", "7_1", "7_2", "9"]):
        send(tmp_path, job_id, "activation=gelu", place(number))
    return SubmittedJobs(launcher(tmp_path), tmp_path)


def test_internals_that_another_submitit_lacks_are_named(monkeypatch, tmp_path):
    """It is not bounded: hydra-submitit-launcher accepts any later version."""
    monkeypatch.setattr(submitit.SlurmJob, "watcher", SimpleNamespace(_registered=set()))
    with pytest.raises(NerveError, match=r"submitit \S+ lacks watcher\._finished\."):
        SubmittedJobs(launcher(tmp_path), tmp_path)
    monkeypatch.delattr(submitit.slurm.slurm, "SlurmExecutor")
    with pytest.raises(NerveError, match=r"lacks SlurmExecutor\._internal_process_submissions"):
        SubmittedJobs(launcher(tmp_path), tmp_path)


def test_jobs_in_the_queue_are_open(jobs, queue):
    queue("7_0:R 7_2:R 9:R 10_0:R")
    queued = jobs.open()
    assert {override: queued.get(override) for override in map(place, range(4))} == {
        place(0): "7_0",
        place(1): None,
        place(2): "7_2",
        place(3): "9",
    }


def test_jobs_submitted_later_are_known_too(jobs, queue, tmp_path):
    queue("7_0:R 11_0:R")
    assert place(5) not in jobs.open()
    send(tmp_path, "11_0", place(5))
    assert jobs.open()[place(5)] == "11_0"


def test_only_the_given_jobs_are_waited_for_until_they_left_the_queue(jobs, queue, monkeypatch):
    """Without an answer, they may still be in the queue."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    calls = queue("7_0:R 7_1:R 9:R", "no answer", "7_0:R 9:R", "9:R")
    jobs.wait({place(0), place(1)})
    assert len(calls.read_text().splitlines()) == 4


def test_jobs_that_slurm_is_ending_are_awaited_before_anything_is_decided(
    jobs, queue, monkeypatch, capsys
):
    """Other jobs of the user do not count, nor jobs of the sweep that are not ending."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    calls = queue("7_0:CG 9:R", "7_0:CG 7_2:CG 9:R", "7_2:PD 9:R 12:CG")
    jobs.settle()
    assert len(calls.read_text().splitlines()) == 3
    assert capsys.readouterr().out.splitlines() == [
        "SLURM is ending 7_0; waiting to see which jobs return"
    ]


def test_an_unanswered_question_about_ending_jobs_is_no_error(jobs, queue):
    """A sweep whose trials are all done does not need SLURM."""
    calls = queue("no socket")
    jobs.settle()
    assert len(calls.read_text().splitlines()) == 1


def test_a_job_that_does_not_end_is_awaited_for_two_minutes(jobs, queue, monkeypatch):
    now = iter(range(0, 1000, 50))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    calls = queue("7_0:CG")
    jobs.settle()
    assert len(calls.read_text().splitlines()) == 3


def test_a_job_of_another_sweep_with_files_in_this_folder_is_not_known(jobs, queue, tmp_path):
    send(tmp_path, "13_0", place(7), sweep=tmp_path / "other")
    queue("7_0:R 13_0:R")
    assert place(7) not in jobs.open()
    jobs.wait({place(7)})


def test_a_job_whose_file_is_rewritten_stays_known(jobs, queue, tmp_path):
    """As after a timeout."""
    queue("7_0:R 7_1:R")
    assert place(1) in jobs.open()
    (tmp_path / ".submitit" / "7_1" / "7_1_nerve.json").unlink()
    assert place(1) in jobs.open()


@pytest.mark.parametrize("how", ["override", "environment"])
def test_the_cluster_to_which_jobs_are_submitted_is_asked(tmp_path, queue, monkeypatch, how):
    options = {"clusters": "far"} if how == "override" else {}
    if how == "environment":
        monkeypatch.setenv("SBATCH_CLUSTERS", "far")
    calls = queue("7_0:R")
    send(tmp_path, "7_0", place(0))
    SubmittedJobs(launcher(tmp_path, additional_parameters=options), tmp_path).open()
    assert "--clusters=far" in calls.read_text()


def test_nothing_is_waited_for_without_a_job(jobs, queue):
    calls = queue("7_0:R")
    jobs.wait(set())
    assert not calls.exists()


@pytest.mark.parametrize("content", [b"damaged", b"[]", b"{}", b'{"folder": 1}', b"\xff", b"3"])
def test_a_job_whose_overrides_cannot_be_read_is_not_known(tmp_path, queue, content):
    queue("7_0:R 7_1:R")
    send(tmp_path, "7_0", place(0)).write_bytes(content)
    send(tmp_path, "7_1", place(1))
    assert SubmittedJobs(launcher(tmp_path), tmp_path).open() == {place(1): "7_1"}


class Evil:
    """Is pickled as a call that creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_the_folder_of_jobs_is_executed(tmp_path, queue):
    """A pickle that a colleague put there under submitit's name, and one under ours."""
    queue("7_0:R 7_1:R 9:R")
    for job_id in ("7_0", "9"):
        path = send(tmp_path, job_id, place(0))
        evil = pickle.dumps(Evil(tmp_path / "made"))
        path.with_name(f"{job_id}_submitted.pkl").write_bytes(evil)
        if job_id == "9":
            path.write_bytes(evil)
    opened = SubmittedJobs(launcher(tmp_path), tmp_path).open()
    assert not (tmp_path / "made").exists()
    assert opened == {place(0): "7_0"}
    pickle.loads(evil)
    assert (tmp_path / "made").exists()  # the danger of the test is real


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_jobs_that_submitit_submitted_are_known_to_the_next_command(tmp_path, queue, n_jobs):
    """An array, and a single job, which submitit sends in another way; once, however often the
    process has swept before."""
    for name in ("sbatch", "srun"):  # submitit looks for srun
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 21\n")
        (tmp_path / name).chmod(0o755)
    for folder in (tmp_path / "other", tmp_path):
        SubmittedJobs(launcher(folder), folder)
    executor = SlurmExecutor(launcher(tmp_path)["submitit_folder"])
    given = [[["activation=gelu", place(number)] for number in range(n_jobs)], range(n_jobs)]
    executor.map_array(print, *given)
    ids = ["21"] if n_jobs == 1 else ["21_0", "21_1", "21_2"]
    queue(" ".join(f"{job_id}:PD" for job_id in ids))
    opened = SubmittedJobs(launcher(tmp_path), tmp_path).open()
    assert [opened[place(number)] for number in range(n_jobs)] == ids


def test_without_an_answer_from_the_queue_nothing_is_submitted(jobs, queue):
    queue("no socket")
    with pytest.raises(NerveError, match="it says: no socket"):
        jobs.open()


def test_the_queue_is_not_asked_if_nothing_was_submitted(tmp_path, queue):
    queue("no socket")
    assert SubmittedJobs(launcher(tmp_path), tmp_path).open() == {}


def test_the_users_filters_of_squeue_do_not_hide_jobs(tmp_path, queue, monkeypatch):
    monkeypatch.setenv("SQUEUE_PARTITION", "gpu")
    calls = queue("7_0:R")
    send(tmp_path, "7_0", place(0))
    SubmittedJobs(launcher(tmp_path), tmp_path).open()
    (asked,) = calls.read_text().splitlines()
    assert "gpu" not in asked
    assert "--all" in asked


def test_submitit_regards_a_job_as_ended_once_it_left_the_queue(jobs, queue, tmp_path):
    """Even if it was never seen there."""
    queue("7_0:R", "no answer", "7_0:R", "9:R")
    folder = launcher(tmp_path)["submitit_folder"]
    first, second = (submitit.SlurmJob(folder, job_id) for job_id in ("7_0", "7_1"))
    assert (first.done(), second.done()) == (False, True)
    first.watcher.update()  # no answer
    assert not first.done()
    first.watcher.update()
    assert not first.done()
    first.watcher.update()
    assert first.done()


def test_the_jobs_of_other_launchers_are_not_known(queue, tmp_path):
    calls = queue("7_0:R")
    jobs = SubmittedJobs({"_target_": "hydra_plugins.ray.RayLauncher"}, tmp_path)
    assert jobs.open() == {}
    jobs.wait({place(0)})
    assert not calls.exists()


@pytest.mark.parametrize(
    "job",
    [
        "PD:launch+failed+requeued+held",
        "PD:JobHeldUser",
        "PD:JobHeldAdmin",
        "PD:job+requeued+in+held+state",
        "PD:DependencyNeverSatisfied",
        "RH",
        "SE",
    ],
)
def test_a_job_that_needs_intervention_is_named_once(jobs, queue, monkeypatch, capsys, job):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reason = job.partition(":")[2].replace("+", " ") or job
    queue(f"7_0:{job} 8:PD:JobHeldUser", f"7_0:{job}", "9:R")
    jobs.wait({place(0)})
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("job 7_0 will not start without intervention")
    assert f"({reason})" in said
    assert "scontrol release 7_0" in said


@pytest.mark.parametrize("job", ["PD:Priority", "PD:Resources", "R:None", "PD", "CG:None"])
def test_a_pending_job_is_waited_for_silently(jobs, queue, monkeypatch, capsys, job):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    queue(f"7_0:{job}", "9:R")
    jobs.wait({place(0)})
    assert capsys.readouterr().out == ""


def test_a_job_that_submitit_waits_for_is_named_too(jobs, queue, tmp_path, capsys):
    queue("7_0:PD:launch+failed+requeued+held")
    job = submitit.SlurmJob(launcher(tmp_path)["submitit_folder"], "7_0")
    for _ in range(2):
        job.watcher.update()
    assert capsys.readouterr().out.count("job 7_0 will not start") == 1


def test_a_queue_that_does_not_answer_in_time_is_an_error(jobs, queue, tmp_path, monkeypatch):
    """Clients would wait without limit for a controller that is down."""
    queue("7_0:R")
    (tmp_path / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr("nerve.cli.sweep.queue.ANSWERS_WITHIN_S", 0.2)
    slow = SubmittedJobs(launcher(tmp_path), tmp_path)
    with pytest.raises(NerveError, match=r"it did not answer within 0\.2 s"):
        slow.open()
    submitit.SlurmJob(launcher(tmp_path)["submitit_folder"], "7_0").watcher.update()  # returns


@pytest.mark.parametrize("state", ["TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "CANCELLED"])
def test_the_end_of_a_job_before_its_run_began_is_reported(jobs, queue, tmp_path, state):
    queue("9:R")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\n[ "$3" = 7_1 ] && echo "JobId=7 JobState={state} Reason=x"\n')
    scontrol.chmod(0o755)
    told = jobs.ended(place(1))
    assert told is not None
    assert told.startswith(f"its job 7_1 ended before the run began, with {state}")
    assert ("hydra.launcher.timeout_min" in told) == (state == "TIMEOUT")
    assert jobs.ended(place(0)) is None  # forgotten
    assert jobs.ended(place(5)) is None  # never sent


def test_of_two_jobs_of_a_trial_the_last_one_is_reported(jobs, queue, tmp_path):
    send(tmp_path, "11_0", place(1))
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "JobId=$3 JobState=FAILED"\n')
    scontrol.chmod(0o755)
    assert "its job 11_0 ended" in str(jobs.ended(place(1)))
