"""`nerve-status PATH…`: the state of each run, read from its files on disk."""

import argparse
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from nerve.cli.console import duration, fail, figure, say
from nerve.cli.queued import queued_trials
from nerve.cli.saved import load_overrides
from nerve.cli.text_table import say_table
from nerve.errors import NerveError, StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.find import find_runs
from nerve.storage.parts import list_parts, part_step, read_part
from nerve.storage.record import RunRecord
from nerve.storage.schema import DATASETS
from nerve.storage.state import LOCK_NAME, RunState

SLOW_S = 60.0
"""A run whose process is alive is slow if its heartbeat, due every ten seconds, is older than
this."""

GO_ON = ("running", "slow", "queued", "starting")
"""States of runs that have not ended."""

ORDER = (*GO_ON, "done", "interrupted", "dead", "failed", "unreadable")

WATCHED_EVERY_S = 10.0

SHOWN_PATH = 40
"""Number of characters of a path that fit into the table."""
METRICS = DATASETS["metrics"]

RIGHT = ("step", "val loss", "time left", "heartbeat")
COLUMNS = ("run", "overrides", "state", *RIGHT, "host", "job")


@dataclass(frozen=True)
class Status:
    """The status of a run.

    Attributes:
        directory: of the run.
        overrides: of its command line.
        state: running, slow (its process lives and has not been heard of for a minute), queued
            (its job of SLURM waits), starting (its job has begun, the run has not), done,
            interrupted (stopped, and saved), dead (its process is gone without a word), failed, or
            unreadable.
        record: None if it cannot be read, or does not exist yet.
        val_loss: the last known one.
        left_s: seconds of training left; None if nothing trains, or too little is known.
        silent_s: seconds since the last sign of life; None once it has ended.
        reason: why it ended, cannot be read, waits for somebody, or what to know of one that is
            done.
        job: the cluster's id of it.
    """

    directory: Path
    overrides: tuple[str, ...]
    state: str
    record: RunRecord | None = None
    val_loss: float | None = None
    left_s: float | None = None
    silent_s: float | None = None
    reason: str = ""
    job: str = ""


def main() -> None:
    """Entry point of `nerve-status`."""
    parser = argparse.ArgumentParser(
        prog="nerve-status",
        description="Shows the state, step, loss, time left, host and job of each run.",
        epilog="slow: the process is alive, but sent no heartbeat for a minute. queued: the SLURM "
        "job is pending. starting: the job has started, the run has not. dead: the process is gone "
        "without having reported an end; start the run again to resume it.",
    )
    parser.add_argument(
        "path",
        nargs="*",
        default=["outputs"],
        help="a run, a sweep, or any folder of runs (default: outputs)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help=f"refresh every {WATCHED_EVERY_S:g} s while any run is active",
    )
    asked = parser.parse_args()
    try:
        while True:
            statuses = statuses_of(asked.path)
            if asked.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")  # clears the screen
            show(statuses)
            if not asked.watch or not any(status.state in GO_ON for status in statuses):
                return
            time.sleep(WATCHED_EVERY_S)
    except StoreError as error:
        fail("nerve-status", str(error))
    except KeyboardInterrupt:
        if not asked.watch:
            sys.exit(128 + signal.SIGINT)


def statuses_of(paths: Sequence[str]) -> list[Status]:
    """The status of each run below `paths`, and of each trial in SLURM's queue.

    Raises:
        StoreError: if there is none.
    """
    none: StoreError | None = None
    try:
        statuses = [status_of(directory) for directory in find_runs(paths)]
    except StoreError as error:
        statuses, none = [], error
    by_path = {os.path.abspath(status.directory): status for status in statuses}
    at_rest = {Path(path) for path, each in by_path.items() if each.state in (*GO_ON, "done")}
    try:
        trials = queued_trials(paths, at_rest)
    except NerveError as error:
        say(f"trials that may be queued are not shown: {error}")
        trials = []
    for trial in trials:
        path = os.path.abspath(trial.directory)
        known = by_path.get(path, Status(trial.directory, trial.overrides, ""))
        by_path[path] = replace(
            known,
            state="starting" if trial.job.state == "R" else "queued",
            job=trial.job_id,
            reason=trial.job.reason if trial.job.waits_for_ever else "",
        )
    if none is not None and not by_path:
        raise none
    return list(by_path.values())


def status_of(directory: Path) -> Status:
    """The current status of the run in `directory`; an unreadable record is a state, too."""
    overrides, damaged = _overrides(directory)
    try:
        return _status_of(RunDirectory(directory), overrides, damaged)
    except (StoreError, OSError) as error:
        reason = "; ".join(filter(None, [str(error), damaged]))
        return Status(directory, overrides, "unreadable", reason=reason)


def _status_of(run: RunDirectory, overrides: tuple[str, ...], damaged: str) -> Status:
    directory = run.path
    state, record = run.state, run.require_record()
    heard = datetime.fromisoformat(record.heartbeat)  # another machine's clock may be ahead
    silent_s = max(0.0, (datetime.now(UTC) - heard).total_seconds())
    is_alive = state == RunState.ALIVE
    left_s = _left_s(record, silent_s) if is_alive else None
    # Measurements are written at once, the step in the record only with the heartbeat.
    measured = [part_step(path) for path in list_parts(directory, METRICS)]
    record.step = max(record.step, *measured) if measured else record.step
    return Status(
        directory,
        overrides,
        ("slow" if silent_s > SLOW_S else "running") if is_alive else str(state),
        record,
        record.final["val_loss"] if "val_loss" in record.final else _last_val_loss(record),
        left_s,
        silent_s if state in (RunState.ALIVE, RunState.DEAD) else None,
        "; ".join(
            filter(None, [": ".join((record.error or {}).values()), record.warning, damaged])
        ),
        _job(record),
    )


def show(statuses: Sequence[Status]) -> None:
    """Prints one row per run, the number of runs in each state, and why runs ended early."""
    counts = Counter(override for status in statuses for override in set(status.overrides))
    labels = {
        status.directory: " ".join(o for o in status.overrides if counts[o] < len(statuses))
        for status in statuses
    }
    ordered = sorted(statuses, key=lambda s: (s.directory.parent, labels[s.directory], s.directory))
    folder = _folder(statuses)
    if folder:
        say(f"in {folder}:")
    say_table(
        COLUMNS, RIGHT, [_cells(status, labels[status.directory], folder) for status in ordered]
    )
    states = Counter(status.state for status in statuses)
    found = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    say(f"{len(statuses)} run{'s' if len(statuses) > 1 else ''}: {found}")
    for line in _reasons(ordered):
        say(line)


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
        (record.host or "") if record else "",
        status.job,
    ]


def _folder(statuses: Sequence[Status]) -> str:
    """The common folder of all runs, printed once if their paths would not fit into the table."""
    if max(len(str(status.directory)) for status in statuses) <= SHOWN_PATH:
        return ""
    parents = {str(status.directory.parent) for status in statuses}
    if len({Path(parent).is_absolute() for parent in parents}) != 1:
        return ""
    folder = os.path.commonpath(parents)
    return "" if folder in ("/", ".") else folder


def _overrides(directory: Path) -> tuple[tuple[str, ...], str]:
    """The overrides of the command line, and why they cannot be read."""
    saved = directory / ".hydra" / "overrides.yaml"
    try:
        return (tuple(load_overrides(saved)) if saved.is_file() else ()), ""
    except (StoreError, OSError) as error:
        return (), str(error)


def _last_val_loss(record: RunRecord) -> float | None:
    """The loss in the newest metrics file that has one."""
    for path in reversed(list_parts(record.directory, METRICS)):
        try:
            part = read_part(path, METRICS, record.run_id)
            losses = [loss for loss in part["val_loss"].to_pylist() if loss is not None]
        except (StoreError, FileNotFoundError):
            continue
        if losses:
            return float(losses[-1])
    return None


def _left_s(record: RunRecord, silent_s: float) -> float | None:
    """Estimates the time left from the pace since the first metrics file that this process
    wrote."""
    try:
        began = (record.directory / LOCK_NAME).stat().st_mtime
        written = [(path.stat().st_mtime, part_step(path)) for path in _parts(record.directory)]
    except FileNotFoundError:
        return None  # the run has no lock, or its files have just been compacted
    since, first = min(
        ((time, step) for time, step in written if time >= began), default=(began, None)
    )
    if first is None:
        if record.restarts:
            return None  # the step at which it resumed is unknown
        first = 0
    heard = datetime.fromisoformat(record.heartbeat).timestamp()
    if record.max_steps is None or record.step <= first or heard <= since:
        return None
    a_step = (heard - since) / (record.step - first)
    return max(0.0, a_step * (record.max_steps - record.step) - silent_s)


def _parts(directory: Path) -> list[Path]:
    return [path for dataset in DATASETS.values() for path in list_parts(directory, dataset)]


def _job(record: RunRecord) -> str:
    job = record.job or {}
    if "array_id" in job:
        return f"{job['array_id']}_{job['array_task']}"
    return str(job.get("id", ""))


if __name__ == "__main__":
    main()
