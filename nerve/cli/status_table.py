"""What `nerve-status` prints."""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nerve.cli.console import duration, figure, say
from nerve.cli.text_table import fits, say_table
from nerve.storage.record import RunRecord

ACTIVE_STATES = ("running", "slow", "queued", "starting")
"""States of runs that have not ended."""

ORDER = (*ACTIVE_STATES, "done", "interrupted", "dead", "failed", "unreadable")

RIGHT = ("step", "val loss", "time left", "heartbeat", "last step")
COLUMNS = ("run", "overrides", "state", *RIGHT, "host", "job")


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Attributes:
        directory: of the run.
        overrides: of its command line.
        state: running, slow (its process is alive, but sent no heartbeat for a minute), queued (its
            SLURM job is pending), starting (its job has started, the run has not), done,
            interrupted (it was stopped and saved), dead (its process is gone without having
            reported an end), failed, or unreadable.
        record: None if it cannot be read or does not exist yet.
        val_loss: the last known one.
        left_s: seconds of training left; None if it is not training, or if they are unknown.
        silent_s: seconds since the last heartbeat; None once it has ended.
        idle_s: seconds since its step last changed, or it was started, if that is long; otherwise
            None. It may be measuring or validating, or its process may live but get nowhere.
        reason: why it ended early, cannot be read, or needs intervention; for a completed run, its
            warning.
        job: the cluster's id of its job.
    """

    directory: Path
    overrides: tuple[str, ...]
    state: str
    record: RunRecord | None = None
    val_loss: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    idle_s: float | None = None
    reason: str = ""
    job: str = ""


def show(statuses: Sequence[Status]) -> None:
    """Prints one row per run, the number of runs in each state, and why runs ended early."""
    counts = Counter(override for status in statuses for override in set(status.overrides))
    labels = {
        status.directory: " ".join(o for o in status.overrides if counts[o] < len(statuses))
        for status in statuses
    }
    ordered = sorted(statuses, key=lambda s: (s.directory.parent, labels[s.directory], s.directory))
    folder, (names, *rows) = _table(ordered, labels)
    if folder:
        say(f"in {folder}:")
    say_table(names, RIGHT, rows)
    states = Counter(status.state for status in statuses)
    found = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    say(f"{len(statuses)} run{'s' if len(statuses) > 1 else ''}: {found}")
    for line in [*_reasons(ordered), *_ways_to_resume(ordered)]:
        say(line)


def _ways_to_resume(statuses: Sequence[Status]) -> list[str]:
    """A line for each run of `nerve-run` that has stopped, and for each sweep with such trials."""
    stopped = [
        status
        for status in statuses
        if status.state in ("interrupted", "dead") and (status.directory / ".hydra").is_dir()
    ]
    alone = [status.directory for status in stopped if status.record and not status.record.sweep]
    sweeps = Counter(s.directory.parent for s in stopped if s.record and s.record.sweep)
    return [
        *(f"to resume: nerve-run resume={shlex.quote(str(directory))}" for directory in alone),
        *(
            f"to resume {n} trial{'s' if n > 1 else ''} in {folder}: repeat the sweep's command"
            for folder, n in sweeps.items()
        ),
    ]


def _reasons(statuses: Sequence[Status]) -> list[str]:
    """A line for each run that has a reason; runs with the same kind of warning share one."""
    lines: list[str] = []
    warned: dict[str, list[Status]] = defaultdict(list)
    for status in statuses:
        if status.record is not None and status.reason == status.record.warning:
            warned[status.reason.partition(":")[0]].append(status)
        elif status.reason:
            lines.append(f"{status.directory} {status.state}: {status.reason}")
    for kind, (first, *others) in warned.items():
        names = ", ".join(str(other.directory) for other in others)
        also = f"; {kind} as well: {names}" if others else ""
        lines.append(f"{first.directory} {first.state}: {first.reason}{also}")
    return lines


def _cells(status: Status, label: str, folder: str) -> list[str]:
    """The table cells of a run, one for each of `COLUMNS`."""
    record = status.record
    return [
        os.path.relpath(status.directory, folder) if folder else str(status.directory),
        label,
        status.state,
        record.progress if record else "",
        figure(status.val_loss),
        "" if status.left_s is None else duration(status.left_s),
        "" if status.silent_s is None else f"{duration(status.silent_s)} ago",
        "" if status.idle_s is None else f"{duration(status.idle_s)} ago",
        (record.host or "") if record else "",
        status.job,
    ]


def _table(statuses: Sequence[Status], labels: dict[Path, str]) -> tuple[str, list[list[str]]]:
    """The common folder, if the paths of the runs are shown below it, and the names and rows of the
    columns in which any run has something."""
    for folder in ("", _common_folder(statuses)):
        rows = [_cells(status, labels[status.directory], folder) for status in statuses]
        shown = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
        table = [[row[i] for i in shown] for row in (list(COLUMNS), *rows)]
        if not folder and fits(table[0], table[1:]):
            break
    return folder, table


def _common_folder(statuses: Sequence[Status]) -> str:
    """The folder of all runs; empty if there is none but the current or the root directory."""
    parents = {str(status.directory.parent) for status in statuses}
    if len({Path(parent).is_absolute() for parent in parents}) != 1:
        return ""
    folder = os.path.commonpath(parents)
    return "" if folder in ("/", ".") else folder
