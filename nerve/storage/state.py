"""Where a run stands, and who is at work in its directory."""

import contextlib
import json
import os
import socket
import time
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import as_store_error, flock, flock_within

LOCK_NAME = ".lock"
PATIENCE_S = 1.0
"""How long a start tries again: whoever only asks for the state holds the lock for an instant."""


class RunIsBusyError(StoreError):
    """Another process is at work in the run directory; the message names its host and pid."""


class RunLock:
    """The right to write in a run directory, held from construction to `release` or death.

    The lock is `flock` on `<directory>/.lock`: no kill and no power cut leaves it behind, and on
    NFS it holds across hosts. The file stays; it names its last holder. On a file system without
    locks a warning says so: of two that start at once, the one that is named last goes on, and else
    the heartbeat keeps them apart.

    Args:
        directory: the run directory; made if it is not there.

    Attributes:
        is_held: whether the lock keeps others out; False on a file system without locks.

    Raises:
        RunIsBusyError: when another process holds it.
        StoreError: when the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = Path(directory) / LOCK_NAME
        with as_store_error(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open
        try:
            self._take(path)
        except BaseException:
            self._file.close()
            raise
        own = {"host": socket.gethostname(), "pid": os.getpid()}
        with as_store_error(path):
            self._file.truncate(0)
            self._file.write(json.dumps(own))
            self._file.flush()
        if not self.is_held:
            time.sleep(PATIENCE_S)
            if holder(path.parent) != own:
                self._file.close()
                raise _busy(path.parent)

    def release(self) -> None:
        """Lets others in; may be called again."""
        self._file.close()

    def _take(self, path: Path) -> None:
        had = flock_within(self._file.fileno(), PATIENCE_S)
        if had is False:
            raise _busy(path.parent)
        self.is_held = had is True


def is_locked(directory: str | os.PathLike[str]) -> bool | None:
    """Whether a live process holds the lock of a run directory; False where there is no lock file,
    None where it cannot be told: the file system has no locks, or the file cannot be opened."""
    try:
        descriptor = os.open(Path(directory) / LOCK_NAME, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        is_free = flock(descriptor, shared=True)
    finally:
        os.close(descriptor)
    return None if is_free is None else not is_free


def holder(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """`host` and `pid` of the process that took the lock last; empty if there is none."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((Path(directory) / LOCK_NAME).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}


def _busy(directory: Path) -> RunIsBusyError:
    return RunIsBusyError(
        f"One process at a time runs in a directory; {directory} is in use by "
        f"{_named(holder(directory))}. Let that one finish or stop it; this run has nothing to do."
    )


def _named(process: dict[str, Any]) -> str:
    if not process:
        return "another process"
    return f"process {process.get('pid')} on host {process.get('host')}"


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
