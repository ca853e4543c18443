"""Files that are whole or not there, and locks that the system takes back from the dead."""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from nerve.errors import StoreError


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Turns what the file system refuses inside the block into a `StoreError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"A run must be able to write in its directory; {path} was refused: {error}. Free "
            "space or quota, or fix its permissions; what was stored before is intact."
        ) from error


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True
) -> None:
    """Puts what `write` writes at `path`, in the place of what was there, at once and durably.

    Without `durable` a power cut may leave an empty file; it is written in a tenth of the time.

    The temporary file is hidden (dataset readers pass over names with a leading dot) and does not
    end in the suffix of `path`, so that no reader ever takes it for a finished one.

    Raises:
        StoreError: when the file system refuses; what was at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with as_store_error(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: a move or a removal survives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(directory: Path) -> None:
    """Removes what writers that were killed left half-written in `directory`."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def flock(descriptor: int, *, shared: bool = False) -> bool:
    """Tries to lock an open file until it is closed; whether nobody else holds it.

    True as well on a file system without locks, after a warning.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("this file system has no locks: nothing keeps two processes apart")
    return True


def flock_within(descriptor: int, seconds: float) -> bool:
    """As `flock`, tried again until the lock is had or the time is over."""
    until = time.monotonic() + seconds
    while not flock(descriptor):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True
