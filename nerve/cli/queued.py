"""Trials that `nerve-run` has submitted to SLURM and that have not started, for `nerve-status`."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nerve.cli.sweep.queue import SENT, QueuedJob, ask, read_sent, squeue
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
    sent = [each for path in paths for each in _sent(Path(path)) if _absolute(each[0]) not in ended]
    queue = ask(squeue(None)) if sent else {}
    return [
        QueuedTrial(directory, overrides, job_id, queue[job_id])
        for directory, overrides, job_id in sent
        if job_id in queue
    ]


def _sent(path: Path) -> Iterator[tuple[Path, tuple[str, ...], str]]:
    """Directory, overrides and job of each submitted trial, if submitit's files are in their usual
    place."""
    for file in sorted((*path.glob(f".submitit/*/*{SENT}"), *path.glob(f"*/.submitit/*/*{SENT}"))):
        sent, folder = read_sent(file), file.parents[2]
        subdirs = [each for each in sent.overrides if each.startswith(_SUBDIR)] if sent else []
        if sent and subdirs and sent.folder == str(_absolute(folder)):
            overrides = tuple(each for each in sent.overrides if not each.startswith(_SUBDIR))
            directory = folder / unquoted(subdirs[-1].removeprefix(_SUBDIR))
            yield directory, overrides, file.name.removesuffix(SENT)


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))
