"""The jobs of a sweep in SLURM's queue, the only place that says whether a job is pending or
running."""

import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence, Set
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nerve.cli.config.compose import SUBMITIT_SLURM
from nerve.cli.console import say
from nerve.cli.sweep.queue import (
    COMPLETING,
    SUBMISSION_SUFFIX,
    QueuedJob,
    cluster_of,
    final_state,
    parse_queue,
    query_queue,
    read_submission,
    squeue,
)
from nerve.errors import NerveError
from nerve.files import write_atomically

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60  # between queries of the queue
_LONGEST_ENDING_S = 120


class SubmittedJobs:
    """The jobs that a sweep has submitted to SLURM through submitit's launcher, in this or earlier
    commands.

    submitit's launcher raises at the first job that was killed, while others may still be pending
    or running. It also asks the accounting, which not every cluster has, and which has no entry for
    an array task cancelled while queued. So it is made to ask the queue instead.

    Args:
        launcher: the values of `hydra.launcher`; jobs of other launchers are unknown.
        folder: of the sweep.
    """

    def __init__(self, launcher: Mapping[str, Any], folder: Path) -> None:
        self._folder = os.path.abspath(folder)
        self._overrides: dict[str, list[str]] = {}
        self._files: Path | None = None
        self._reported: set[str] = set()
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._files = Path(launcher["submitit_folder"])
            self._squeue = squeue(cluster_of(launcher))
            _require_internals()
            _make_submitit_record_submissions(self._folder)
            _make_submitit_query_the_queue(self._squeue, self._report_blocked)

    def open(self) -> dict[str, str]:
        """The ids of the jobs that are queued or running, by each override that they were given.

        Raises:
            NerveError: if SLURM does not answer.
        """
        return {
            override: job_id for job_id in self._queue() for override in self._overrides[job_id]
        }

    def settle(self) -> None:
        """Returns once SLURM is not ending any of the jobs, or after two minutes.

        A run that was asked to stop waits to be killed, because SLURM requeues a job only then;
        until then it is unknown whether its job will return.
        """
        until = time.monotonic() + _LONGEST_ENDING_S
        is_reported = False
        while (ending := self._ending()) and time.monotonic() < until:
            if not is_reported:
                say(
                    f"SLURM is ending {', '.join(sorted(ending))}; waiting to see which jobs return"
                )
            is_reported = True
            time.sleep(1.0)

    def _ending(self) -> list[str]:
        try:
            return [job_id for job_id, job in self._queue().items() if job.state == COMPLETING]
        except NerveError:  # callers that need an answer ask again
            return []

    def wait(self, overrides: Set[str]) -> None:
        """Returns once no job that was given one of these overrides is queued or running."""
        pause = 1.0
        while overrides and self._may_be_open(overrides):
            time.sleep(pause)
            pause = min(1.1 * pause, _LONGEST_PAUSE_S)

    def _may_be_open(self, overrides: Set[str]) -> bool:
        try:
            return bool(overrides & self.open().keys())
        except NerveError as error:
            log.warning("%s", str(error))
            return True

    def ended(self, override: str) -> str | None:
        """How the last job that was given the override ended, for a trial that it did not start;
        None if SLURM has forgotten it."""
        for job_id, file in self._submission_files().items():
            self._load_submission(job_id, file)
        ids = [job_id for job_id, given in self._overrides.items() if override in given]
        if not ids:
            return None
        job_id = max(ids, key=lambda each: [int(n) for n in re.findall(r"\d+", each)])
        state = final_state(job_id)
        if state is None:
            return None
        why = " (see hydra.launcher.timeout_min)" if state == "TIMEOUT" else ""
        return f"its job {job_id} ended before the run began, with {state}{why}"

    def _queue(self) -> dict[str, QueuedJob]:
        """The jobs of the sweep that are in the queue, by id."""
        files = self._submission_files()
        known = files.keys() | self._overrides.keys()
        if not known:
            return {}
        queue = query_queue(self._squeue)
        for job_id in files.keys() & queue.keys():
            self._load_submission(job_id, files[job_id])
        mine = {job_id: queue[job_id] for job_id in self._overrides.keys() & queue.keys()}
        self._report_blocked(
            {job_id: job for job_id, job in mine.items() if self._overrides[job_id]}
        )
        return mine

    def _load_submission(self, job_id: str, file: Path) -> None:
        if job_id not in self._overrides and (submission := read_submission(file)) is not None:
            # Sweeps may share the folder of these files.
            mine = submission.folder == self._folder
            self._overrides[job_id] = list(submission.overrides) if mine else []

    def _report_blocked(self, queue: Mapping[str, QueuedJob]) -> None:
        """Reports each job that needs intervention, once."""
        for job_id, job in sorted(queue.items()):
            if job.waits_for_ever and job_id not in self._reported:
                self._reported.add(job_id)
                say(
                    f"job {job_id} will not start without intervention "
                    f"({job.reason or job.state}): fix the cause, then scontrol release {job_id}, "
                    f"or scancel {job_id}"
                )

    def _submission_files(self) -> dict[str, Path]:
        """The file kept for each job, by the job's id."""
        if self._files is None:
            return {}
        pattern = f"{self._files.name.replace('%j', '*')}/*{SUBMISSION_SUFFIX}"
        files = self._files.parent.glob(pattern)
        return {path.name.removesuffix(SUBMISSION_SUFFIX): path for path in files}


def _require_internals() -> None:
    """Raises `NerveError` for a submitit without the internals that are replaced or used here."""
    from submitit.slurm import slurm

    lacking = [
        f"{owner}.{name}"
        for owner, names in {
            "SlurmExecutor": ("_internal_process_submissions",),
            "SlurmInfoWatcher": ("_make_command", "read_info"),
            "SlurmJob": ("watcher",),
        }.items()
        for name in names
        if not hasattr(getattr(slurm, owner, None), name)
    ]
    watcher = vars(slurm.SlurmJob.watcher) if not lacking else {}
    lacking += [f"watcher.{name}" for name in ("_registered", "_finished") if name not in watcher]
    if lacking:
        raise NerveError(
            "A sweep on SLURM uses internals of submitit that may differ in every version; "
            f"submitit {version('submitit')} lacks {', '.join(lacking)}. Install one that has "
            "them, such as 1.5.4."
        )


def _make_submitit_record_submissions(folder: str) -> None:
    """Makes submitit, in this process, write what each job is for next to its own files."""
    from submitit.slurm.slurm import SlurmExecutor

    submitit: Any = SlurmExecutor
    process = submitit._internal_process_submissions
    process = getattr(process, "__wrapped__", process)  # from an earlier sweep in this process

    @functools.wraps(process)
    def process_and_record(executor: Any, submissions: list[Any]) -> list[Any]:
        jobs = process(executor, submissions)
        for job, submission in zip(jobs, submissions, strict=True):
            _write_submission(
                Path(job.paths.folder, f"{job.job_id}{SUBMISSION_SUFFIX}"),
                folder,
                submission.args[0],
            )
        return jobs

    submitit._internal_process_submissions = process_and_record


def _write_submission(path: Path, folder: str, overrides: Sequence[str]) -> None:
    content = json.dumps({"folder": folder, "overrides": list(overrides)})
    write_atomically(path, lambda file: file.write(content.encode()))


def _make_submitit_query_the_queue(
    command: list[str], report_blocked: Callable[[Mapping[str, QueuedJob]], None]
) -> None:
    """Makes submitit, in this process, regard a job as ended once it is not in the queue."""
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Watcher(SlurmInfoWatcher):
        def _make_command(self) -> list[str]:
            return command

        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            queue = parse_queue(string if isinstance(string, str) else string.decode())
            waited_for = self._registered - self._finished
            report_blocked({job_id: queue[job_id] for job_id in waited_for & queue.keys()})
            return {
                job_id: {"State": "RUNNING" if job_id in queue else "ENDED"}
                for job_id in waited_for
            }

    SlurmJob.watcher = Watcher(delay_s=_LONGEST_PAUSE_S)
