"""The jobs of a sweep in SLURM's queue, which alone says whether one still waits or is at work."""

import functools
import json
import logging
import os
import subprocess
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from nerve.cli.console import say
from nerve.errors import NerveError
from nerve.files import write_atomically

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

log = logging.getLogger(__name__)

_SENT = "_nerve.json"
"""How the name of the file ends, beside submitit's own, that says what a job was sent for. Those of
submitit are pickles: reading one from a folder that is shared runs what somebody put into it."""

_LONGEST_PAUSE_S = 60  # from one question to the queue to the next
_LONGEST_ENDING_S = 120
_ENDING = "CG"  # completing: its processes are being ended, or have just been


class SentJobs:
    """The jobs that a sweep has sent to SLURM through submitit's launcher, by any command so far.

    submitit's launcher raises at the first job that was killed, while others may still be waiting
    or at work. And it asks the accounting, which not every cluster keeps, and where a task of an
    array leaves nothing if it is cancelled while it is queued: it is made to ask the queue instead.

    Args:
        launcher: the values of `hydra.launcher`; jobs of another launcher are not known.
        folder: of the sweep.
    """

    def __init__(self, launcher: Mapping[str, Any], folder: Path) -> None:
        self._folder = os.path.abspath(folder)
        self._overrides: dict[str, list[str]] = {}
        self._files: Path | None = None
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._files = Path(launcher["submitit_folder"])
            self._squeue = _squeue(launcher)
            _make_submitit_say_what_it_sends(self._folder)
            _make_submitit_ask_the_queue(self._squeue)

    def open(self) -> dict[str, str]:
        """The ids of those that are queued or at work, by each override that they were given.

        Raises:
            NerveError: if SLURM does not answer.
        """
        return {
            override: job_id for job_id in self._queue() for override in self._overrides[job_id]
        }

    def settle(self) -> None:
        """Returns once SLURM is not about to end one, or after two minutes.

        A run that was told to go stays until it is killed, as SLURM requeues a job only then; in
        the meantime none can tell whether its job comes back.
        """
        until = time.monotonic() + _LONGEST_ENDING_S
        said = False
        while (ending := self._ending()) and time.monotonic() < until:
            if not said:
                say(f"SLURM is ending {', '.join(sorted(ending))}; waiting to see what comes back")
            said = True
            time.sleep(1.0)

    def _ending(self) -> list[str]:
        try:
            return [job_id for job_id, state in self._queue().items() if state == _ENDING]
        except NerveError:  # whoever needs an answer asks again
            return []

    def wait(self, overrides: Set[str]) -> None:
        """Returns once no job that was given one of these overrides is queued or at work."""
        pause = 1.0
        while overrides and self._may_be_open(overrides):
            time.sleep(pause)
            pause = min(1.1 * pause, _LONGEST_PAUSE_S)

    def _may_be_open(self, overrides: Set[str]) -> bool:
        try:
            return bool(overrides & self.open().keys())
        except NerveError as error:
            log.warning("%s", error)
            return True

    def _queue(self) -> dict[str, str]:
        """The states of the jobs of the sweep that the queue has, by their ids."""
        files = self._sent()
        known = files.keys() | self._overrides.keys()
        if not known:
            return {}
        queue = _ask(self._squeue)
        for job_id in files.keys() & queue.keys() - self._overrides.keys():
            given = _load(files[job_id])
            if given is not None:
                folder, overrides = given
                # Sweeps may share the place of these files.
                self._overrides[job_id] = overrides if folder == self._folder else []
        return {job_id: queue[job_id] for job_id in self._overrides.keys() & queue.keys()}

    def _sent(self) -> dict[str, Path]:
        """What is kept of each job, by the job's id."""
        if self._files is None:
            return {}
        pattern = f"{self._files.name.replace('%j', '*')}/*{_SENT}"
        files = self._files.parent.glob(pattern)
        return {path.name.removesuffix(_SENT): path for path in files}


def _load(file: Path) -> tuple[str, list[str]] | None:
    """The folder of the sweep that a job belongs to, and the overrides that it was given.

    None if they cannot be told: what is sent twice runs once.
    """
    try:
        content = json.loads(file.read_bytes())
        return str(content["folder"]), [str(override) for override in content["overrides"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _make_submitit_say_what_it_sends(folder: str) -> None:
    """Lets submitit, in this process, write what each job is for beside its own files."""
    from submitit.slurm.slurm import SlurmExecutor

    submitit: Any = SlurmExecutor
    process = submitit._internal_process_submissions
    process = getattr(process, "__wrapped__", process)  # of a sweep before in this process

    @functools.wraps(process)
    def process_and_say(executor: Any, submissions: list[Any]) -> list[Any]:
        jobs = process(executor, submissions)
        for job, submission in zip(jobs, submissions, strict=True):
            _say(Path(job.paths.folder, f"{job.job_id}{_SENT}"), folder, submission.args[0])
        return jobs

    submitit._internal_process_submissions = process_and_say


def _say(path: Path, folder: str, overrides: Sequence[str]) -> None:
    content = json.dumps({"folder": folder, "overrides": list(overrides)})
    write_atomically(path, lambda file: file.write(content.encode()))


def _make_submitit_ask_the_queue(squeue: list[str]) -> None:
    """Lets submitit, in this process, take a job for ended once the queue does not have it."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Watcher(SlurmInfoWatcher):
        def _make_command(self) -> list[str]:
            return squeue

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            queue = _parsed(string if isinstance(string, str) else string.decode())
            return {
                job_id: {"State": "RUNNING" if job_id in queue else "ENDED"}
                for job_id in self._registered - self._finished
            }

    SlurmJob.watcher = Watcher(delay_s=_LONGEST_PAUSE_S)


def _ask(squeue: list[str]) -> dict[str, str]:
    try:
        answer = subprocess.run(squeue, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise NerveError(
            "What becomes of the jobs that a sweep has sent is asked of squeue, on a machine of "
            f"the cluster; it says: {error.stderr.strip() or error}. Try again."
        ) from error
    return _parsed(answer.stdout)


def _parsed(answer: str) -> dict[str, str]:
    """The short state of each job."""
    lines = (line.split() for line in answer.splitlines())
    return {line[0]: line[1] for line in lines if len(line) == 2}


def _squeue(launcher: Mapping[str, Any]) -> list[str]:
    """The command that prints id and state of each job of this user that is queued or at work.

    Those that are just being requeued, suspended or held are among them.
    """
    filters = [f"--unset={name}" for name in os.environ if name.startswith("SQUEUE_")]
    mine = ["--all", "--array", f"--user={os.getuid()}"]
    where = (launcher.get("additional_parameters") or {}).get("clusters")
    where = where or os.environ.get("SBATCH_CLUSTERS")
    clusters = [f"--clusters={where}"] if where else []
    return ["env", *filters, "squeue", "--noheader", "--format=%i %t", *mine, *clusters]
