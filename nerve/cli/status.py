"""`nerve-status PATH…`: the state of each run, read from its files on disk."""

if __name__ == "__main__":  # python -m, as the command: Ctrl-C may come during the imports below
    from nerve.cli import entry

    entry.status()
    raise SystemExit

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from nerve.cli.console import error_text, fail, say
from nerve.cli.queued import queued_trials
from nerve.cli.saved import load_overrides
from nerve.cli.status_table import ACTIVE_STATES, Status, show
from nerve.config import require_path
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

IDLE_S = 60.0
"""If the step of such a run has not changed for longer than this, the table says for how long."""

WATCHED_EVERY_S = 10.0

METRICS = DATASETS["metrics"]


def main() -> None:
    """Entry point of `nerve-status`."""
    parser = argparse.ArgumentParser(
        prog="nerve-status",
        description="Shows the state, step, loss, time left, host and job of each run.",
        epilog="slow: the process is alive, but sent no heartbeat for a minute. queued: the SLURM "
        "job is pending. starting: the job has started, the run has not. dead: the process is gone "
        "without having reported an end; its last checkpoint is what it resumes from. last step: "
        "when a run that is alive last reached a new step, if that is more than a minute ago.",
    )
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="*",
        default=["outputs"],
        help="a run, a sweep, or any folder of runs (default: outputs)",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help=f"refresh every {WATCHED_EVERY_S:g} s while any run is active",
    )
    args = parser.parse_args()
    try:
        for path in args.path:
            require_path("PATH", path)
        while True:
            statuses = statuses_of(args.path)
            if args.watch and sys.stdout.isatty():
                print("\x1b[2J\x1b[H", end="")  # clears the screen
            show(statuses)
            if not args.watch or not any(status.state in ACTIVE_STATES for status in statuses):
                return
            time.sleep(WATCHED_EVERY_S)
    except NerveError as error:
        fail("nerve-status", str(error))
    except KeyboardInterrupt:
        if not args.watch:
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
    at_rest = {
        Path(path) for path, each in by_path.items() if each.state in (*ACTIVE_STATES, "done")
    }
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
    silent_s = _seconds_since(record.heartbeat)
    is_alive = state == RunState.ALIVE
    idle_s = _seconds_since(record.advanced) if is_alive and record.advanced else 0.0
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
        idle_s if idle_s > IDLE_S else None,
        "; ".join(filter(None, [error_text(record.error), record.warning, damaged])),
        _job(record),
    )


def _seconds_since(time: str) -> float:
    """Seconds since a time of a record; another machine's clock may be ahead."""
    return max(0.0, (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds())


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
    heartbeat = datetime.fromisoformat(record.heartbeat).timestamp()
    if record.max_steps is None or record.step <= first or heartbeat <= since:
        return None
    a_step = (heartbeat - since) / (record.step - first)
    return max(0.0, a_step * (record.max_steps - record.step) - silent_s)


def _parts(directory: Path) -> list[Path]:
    return [path for dataset in DATASETS.values() for path in list_parts(directory, dataset)]


def _job(record: RunRecord) -> str:
    job = record.job or {}
    if "array_id" in job:
        return f"{job['array_id']}_{job['array_task']}"
    return str(job.get("id", ""))
