"""Trials that `nerve-run` has submitted to SLURM and that have not started, for `nerve-status`."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nerve.cli.sweep.queue import SUBMISSION_SUFFIX, QueuedJob, query_queue, read_submission, squeue
from nerve.config import unquoted

_SUBDIR = "hydra.sweep.subdir="


@dataclass(frozen=True)
class QueuedTrial:
    """A trial whose job is in the queue.

    Attributes:
        directory: where its run is, or will be.
        overrides: the overrides that distinguish it.
        job_id: of its job.
        job: in the queue.
    """

    directory: Path
    overrides: tuple[str, ...]
    job_id: str
    job: QueuedJob


def queued_trials(paths: Iterable[str], ended: set[Path]) -> list[QueuedTrial]:
    """The queued trials of the sweeps at or directly below `paths`.

    Args:
        paths: those given to the command.
        ended: absolute directories of runs for which no job can be pending.

    Raises:
        NerveError: if there are such trials and SLURM does not report their state.
    """
    submissions = [
        each
        for path in paths
        for each in _submissions(Path(path))
        if _absolute(each[0]) not in ended
    ]
    queue = query_queue(squeue(None)) if submissions else {}
    return [
        QueuedTrial(directory, overrides, job_id, queue[job_id])
        for directory, overrides, job_id in submissions
        if job_id in queue
    ]


def _submissions(path: Path) -> Iterator[tuple[Path, tuple[str, ...], str]]:
    """Directory, overrides and job of each submitted trial, if submitit's files are in their usual
    place."""
    for file in sorted(
        (
            *path.glob(f".submitit/*/*{SUBMISSION_SUFFIX}"),
            *path.glob(f"*/.submitit/*/*{SUBMISSION_SUFFIX}"),
        )
    ):
        submission, folder = read_submission(file), file.parents[2]
        subdirs = (
            [each for each in submission.overrides if each.startswith(_SUBDIR)]
            if submission
            else []
        )
        if submission and subdirs and submission.folder == str(_absolute(folder)):
            overrides = tuple(each for each in submission.overrides if not each.startswith(_SUBDIR))
            directory = folder / unquoted(subdirs[-1].removeprefix(_SUBDIR))
            yield directory, overrides, file.name.removesuffix(SUBMISSION_SUFFIX)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
