"""Jobs of SLURM that submitit has sent, followed to their end also where its launcher gives up."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

_SUBMITTED = "_submitted.pkl"
_QUEUED = "PENDING,CONFIGURING,RUNNING,SUSPENDED"


class SentJobs:
    """The jobs that a launcher sends from now on, and those sent before that are to be followed.

    submitit's launcher raises at the first job that was killed, while others may still be waiting
    or at work; and it would wait for ever for a task of an array that was cancelled while it was
    queued, which it is kept from here.

    Args:
        launcher: the values of `hydra.launcher`; jobs of another launcher than submitit's for SLURM
            are not known.
    """

    def __init__(self, launcher: Mapping[str, Any]) -> None:
        self._folder: Path | None = None
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._folder = Path(launcher["submitit_folder"])
            self._n_tasks = launcher["nodes"] * launcher["tasks_per_node"]
            _look_for_cancelled_tasks()
        before = self._files()
        self._followed: set[str] = set()
        self._others = before.keys()
        queue = (_queue(_QUEUED) if before else None) or set()
        self._queued = {
            override: job_id
            for job_id in before.keys() & queue
            for override in _overrides(before[job_id])
        }

    def follow(self, override: str) -> bool:
        """Whether a job with that override was in the queue at first; if so, it is waited for."""
        job_id = self._queued.get(override)
        if job_id is not None:
            self._followed.add(job_id)
        return job_id is not None

    def wait(self) -> None:
        """Returns once none of them is queued or at work."""
        jobs = (self._files().keys() - self._others) | self._followed
        if not jobs or self._folder is None:
            return
        import submitit

        for job_id in sorted(jobs):
            submitit.SlurmJob(self._folder, job_id, tasks=list(range(self._n_tasks))).wait()

    def _files(self) -> dict[str, Path]:
        """What submitit keeps of each job that this sweep has sent so far, by the job's id."""
        if self._folder is None:
            return {}
        pattern = f"{self._folder.name.replace('%j', '*')}/*{_SUBMITTED}"
        files = self._folder.parent.glob(pattern)
        return {path.name.removesuffix(_SUBMITTED): path for path in files}


def _overrides(file: Path) -> list[str]:
    """Those that the launcher gave to a job; none if they cannot be told."""
    from submitit.core.utils import DelayedSubmission

    try:
        overrides: list[str] = DelayedSubmission.load(file).args[0]
    except Exception:  # a pickle of another version of anything; what is sent twice runs once
        return []
    return overrides


def _look_for_cancelled_tasks() -> None:
    """Makes submitit look into the queue for what the accounting no longer knows.

    Of a task of an array that is cancelled while it is queued SLURM keeps nothing: it is no longer
    among those of the array that wait. What submitit last read of it, "pending", would stay.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Watcher(SlurmInfoWatcher):
        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            info: dict[str, dict[str, str]] = super().read_info(string)
            forgotten = (self._info_dict.keys() - self._finished) - info.keys()
            queue = _queue("all") if forgotten else None
            if queue is not None:
                for job_id in forgotten - queue:
                    info[job_id] = {"JobID": job_id, "State": "CANCELLED"}
            return info

    SlurmJob.watcher = Watcher(delay_s=SlurmJob.watcher._delay_s)


def _queue(states: str) -> set[str] | None:
    """This user's jobs that SLURM knows in one of these states; None if it does not answer."""
    mine = ["--array", f"--states={states}", f"--user={os.getuid()}"]
    command = ["squeue", "--noheader", "--format=%i", *mine]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # no SLURM here
        return None
    return set(answer.stdout.split()) if answer.returncode == 0 else None
