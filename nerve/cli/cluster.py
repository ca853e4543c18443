"""The jobs of a sweep in SLURM's queue, which alone says whether one still waits or is at work."""

import os
import subprocess
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from nerve.errors import NerveError

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

_SUBMITTED = "_submitted.pkl"
_LONGEST_PAUSE_S = 60


class SentJobs:
    """The jobs that a sweep has sent to SLURM through submitit's launcher, by any command so far.

    submitit's launcher raises at the first job that was killed, while others may still be waiting
    or at work. And it asks the accounting, which not every cluster keeps, and where a task of an
    array leaves nothing if it is cancelled while it is queued: it is made to ask the queue instead.

    Args:
        launcher: the values of `hydra.launcher`; jobs of another launcher are not known.
    """

    def __init__(self, launcher: Mapping[str, Any]) -> None:
        self._folder: Path | None = None
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._folder = Path(launcher["submitit_folder"])
            _make_submitit_ask_the_queue()
        self._overrides: dict[str, list[str]] = {}

    def open(self) -> dict[str, str]:
        """The ids of those that are queued or at work, by each override that they were given.

        Raises:
            NerveError: if SLURM does not answer.
        """
        files = self._files()
        if not files:
            return {}
        queue = _ask_the_queue()
        for job_id in files.keys() & queue - self._overrides.keys():
            self._overrides[job_id] = _overrides(files[job_id])
        return {
            override: job_id
            for job_id in files.keys() & queue
            for override in self._overrides[job_id]
        }

    def wait(self, overrides: Set[str]) -> None:
        """Returns once no job that was given one of these overrides is queued or at work."""
        pause = 1.0
        while overrides and self._may_be_open(overrides):
            time.sleep(pause)
            pause = min(1.1 * pause, float(_LONGEST_PAUSE_S))

    def _may_be_open(self, overrides: Set[str]) -> bool:
        try:
            return bool(overrides & self.open().keys())
        except NerveError:  # it will answer again
            return True

    def _files(self) -> dict[str, Path]:
        """What submitit keeps of each job, by the job's id."""
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


def _make_submitit_ask_the_queue() -> None:
    """Lets submitit, in this process, take a job for ended once the queue does not have it."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Watcher(SlurmInfoWatcher):
        def _make_command(self) -> list[str]:
            return _squeue()

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            text = string if isinstance(string, str) else string.decode()
            queue = text.split()
            return {
                job_id: {"State": "RUNNING" if job_id in queue else "ENDED"}
                for job_id in self._registered - self._finished
            }

    SlurmJob.watcher = Watcher(delay_s=_LONGEST_PAUSE_S)


def _ask_the_queue() -> set[str]:
    try:
        answer = subprocess.run(_squeue(), capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise NerveError(
            "What a sweep has sent to SLURM must be known before it sends more; squeue says: "
            f"{error.stderr.strip() or error}. Nothing was sent; try again, on a machine of the "
            "cluster."
        ) from error
    return set(answer.stdout.split())


def _squeue() -> list[str]:
    """The command that prints the id of each job of this user that is queued or at work.

    Those that are just being requeued, suspended or held are among them.
    """
    filters = [f"--unset={name}" for name in os.environ if name.startswith("SQUEUE_")]
    mine = ["--all", "--array", f"--user={os.getuid()}"]
    return ["env", *filters, "squeue", "--noheader", "--format=%i", *mine]
