"""The state of a run, and the lock on its directory."""

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
"""How long to retry taking the lock: a process that only reads the state holds it for an
instant."""


class RunIsBusyError(StoreError):
    """Another process is using the run directory; the message names its host and pid."""


class RunLock:
    """The right to write in a run directory, held from construction until `release` or the end of
    the process.

    The lock is `flock` on `<directory>/.lock`: it does not outlive its process, and on NFS it works
    across hosts. The file remains and names its last holder. On a file system without locks, a
    warning is logged. If two processes start at the same time there, the one that is named last
    continues; otherwise the heartbeat keeps them apart.

    Args:
        directory: the run directory; created if it does not exist.

    Attributes:
        is_held: whether the lock keeps other processes out; False on a file system without locks.

    Raises:
        RunIsBusyError: if another process holds it.
        StoreError: if the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        path = Path(directory) / LOCK_NAME
        with as_store_error(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - held open
        try:
            self._take(path)
        except BaseException:
            self._file.close()
            raise

    def release(self) -> None:
        """Releases the lock; may be called repeatedly."""
        self._file.close()

    def _take(self, path: Path) -> None:
        """Locks the file and writes into it who holds it."""
        had = flock_within(self._file.fileno(), PATIENCE_S)
        if had is False:
            raise _busy(path.parent)
        self.is_held = had is True
        own = {"host": socket.gethostname(), "pid": os.getpid()}
        with as_store_error(path):
            self._file.truncate(0)
            self._file.write(json.dumps(own).encode())
        if not self.is_held:
            time.sleep(PATIENCE_S)
            if holder(path.parent) != own:
                raise _busy(path.parent)


def is_locked(directory: str | os.PathLike[str]) -> bool | None:
    """Whether a live process holds the lock of a run directory; False if there is no lock file,
    None if unknown: the file system has no locks, or the file cannot be opened."""
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
        f"Only one process may run in a directory; {directory} is in use by "
        f"{_named(holder(directory))}. Wait until that process finishes, or stop it."
    )


def _named(process: dict[str, Any]) -> str:
    if not process:
        return "another process"
    return f"process {process.get('pid')} on host {process.get('host')}"


FRESH = timedelta(seconds=60)
"""If the lock says nothing, a run with a heartbeat younger than this counts as alive."""


class RunState(StrEnum):
    """The state of a run directory.

    - `new`: no run yet.
    - `alive`: a process is running it.
    - `done`: the run reached its end.
    - `interrupted`: the run was asked to stop, and saved. Starting it resumes it.
    - `dead`: the process was killed or lost power. Starting the run resumes it from its last
      checkpoint.
    - `failed`: the run ended with an error. It is only restarted with `retry`.
    """

    NEW = "new"
    ALIVE = "alive"
    DONE = "done"
    INTERRUPTED = "interrupted"
    DEAD = "dead"
    FAILED = "failed"
