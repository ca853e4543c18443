"""Where a run stands, as anyone can tell from its directory: what to do with it, what to show."""

import os
import socket
import time
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path

from nerve.results.lock import LOCK_NAME, RunIsBusyError, is_locked
from nerve.results.record import RECORD_NAME, RunRecord

FRESH = timedelta(seconds=60)
"""A running run whose heartbeat is younger than this counts as alive where no lock can tell."""


class RunState(StrEnum):
    """What a run directory holds.

    - `new`: no run yet.
    - `alive`: a process is at work in it.
    - `done`: a run that reached its end.
    - `interrupted`: a run that was asked to stop, and saved. Starting it resumes it.
    - `dead`: a run whose process vanished without a word (killed, power cut). Starting it resumes
      it from its last checkpoint.
    - `failed`: a run that ended with an error. Starting it is refused, unless it is asked to retry.
    """

    NEW = "new"
    ALIVE = "alive"
    DONE = "done"
    INTERRUPTED = "interrupted"
    DEAD = "dead"
    FAILED = "failed"


def run_state(directory: str | os.PathLike[str]) -> RunState:
    """Where the run in `directory` stands; a directory that is not there is `new`.

    Raises:
        StoreError: as `RunRecord.load`, for a record that is damaged or of a newer nerve.
    """
    return open_run(directory)[0]


def open_run(directory: str | os.PathLike[str]) -> tuple[RunState, RunRecord | None]:
    """Where the run in `directory` stands, and its record, read once; None where there is none.

    The lock decides between alive and dead. A lock may not reach across hosts on every file system,
    and code of one's own may take none: a run of another host, or without a lock file, is alive,
    too, while its heartbeat is younger than a minute.

    Raises:
        StoreError: as `RunRecord.load`, for a record that is damaged or of a newer nerve.
    """
    # The lock first: a run that ends in between then shows as ended.
    locked = is_locked(directory)
    if not (Path(directory) / RECORD_NAME).exists():
        return RunState.ALIVE if locked else RunState.NEW, None
    record = RunRecord.load(directory)
    return _state(record, locked), record


def wait_for_silence(directory: str | os.PathLike[str]) -> None:
    """Returns once it is sure that no other host runs the run in `directory`, whose lock is held.

    That takes up to a minute where another host's heartbeat is fresh: after its node was lost, or
    where locks do not reach across hosts.

    Raises:
        RunIsBusyError: when the heart beats on.
    """
    first = record = RunRecord.load(directory)
    while record.run_status == "running" and _beats_without_lock(record):
        if record.heartbeat != first.heartbeat:
            raise RunIsBusyError(
                f"One process at a time runs in a directory; {directory} is in use on host "
                f"{record.host}, whose heartbeat goes on. Let that one finish or stop it."
            )
        time.sleep(1.0)
        record = RunRecord.load(directory)


def _state(record: RunRecord, locked: bool) -> RunState:
    if record.run_status == "done":
        return RunState.DONE
    if locked or (record.run_status == "running" and _beats_without_lock(record)):
        return RunState.ALIVE
    if record.run_status == "running":
        return RunState.DEAD
    return RunState(record.run_status)


def _beats_without_lock(record: RunRecord) -> bool:
    """Whether the heartbeat is fresh, of a run that a lock on this host says nothing of."""
    if record.host == socket.gethostname() and (record.directory / LOCK_NAME).exists():
        return False
    return datetime.now(UTC) - datetime.fromisoformat(record.heartbeat) < FRESH
