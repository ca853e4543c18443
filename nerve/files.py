"""Files that are written atomically, and locks that end with their process."""

import contextlib
import errno
import fcntl
import functools
import glob
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from nerve.errors import StoreError

log = logging.getLogger(__name__)

_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that does not support sync; the data is written nevertheless."""


@contextlib.contextmanager
def as_store_error(path: Path) -> Iterator[None]:
    """Turns an `OSError` inside the block into a `StoreError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"A run must be able to write in its directory; {path} cannot be written: {error}. "
            "Free up space or quota, or fix its permissions; data stored earlier is intact."
        ) from error


def require_there(directory: Path) -> None:
    """Raises `StoreError` if the directory of an active run is gone: recreating it would leave a
    directory that looks like a run but lacks all earlier data."""
    if not directory.is_dir():
        raise StoreError(
            f"A run writes in its own directory; {directory} no longer exists: it was renamed "
            "or deleted while the run was active, and the run stops. Do not move it until the "
            "run has ended; a renamed directory is intact, and the run can be resumed there."
        )


def write_atomically(
    path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True
) -> None:
    """Atomically and durably replaces the file at `path` by what `write` writes.

    Without `durable`, writing takes a tenth of the time, but a power failure may leave an empty
    file.

    The temporary file is hidden (dataset readers ignore names with a leading dot) and does not end
    in the suffix of `path`, so that no reader takes it for a finished one.

    Raises:
        StoreError: if the file cannot be written; the previous file at `path` is then unchanged.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with as_store_error(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                if durable:
                    _sync(file)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` as an absolute path, with `~` replaced by the user's home."""
    return Path(os.path.expanduser(path)).absolute()


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable, so that a move or removal survives a power failure.

    If the file system does not support this for directories, a warning is logged once.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # write permission without read permission
        _say_once("names in a directory that cannot be opened may not survive a power failure")
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*_NOT_SUPPORTED, errno.EBADF):
            raise
        _say_once(
            "this file system does not sync directories: names may be lost at a power failure"
        )
    finally:
        os.close(descriptor)


def _sync(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _say_once("this file system does not sync files: the last may be lost at a power failure")


def remove_temporaries(directory: Path) -> None:
    """Removes the temporary files that killed writers left in `directory`.

    Raises:
        StoreError: if a file cannot be removed.
    """
    with as_store_error(directory):
        for path in directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def building_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent` for files that are moved to their place once they are complete.

    Its permissions follow the umask. It is removed at the end. Folders with the same prefix that
    killed writers left are removed at the start: those that nobody has locked or, on a file system
    without locks, in which nothing has changed for a day.
    """
    for left in parent.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError), _opened(left) as descriptor:
            is_free = flock(descriptor)
            if is_free or (is_free is None and _age_s(left) > _ABANDONED_AFTER_S):
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        folder = _locked_folder(parent, prefix, stack)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


_ABANDONED_AFTER_S = 24 * 3600


def _locked_folder(parent: Path, prefix: str, stack: contextlib.ExitStack) -> Path:
    """A new folder, locked until the end of `stack`."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
        # Another writer may remove it as a leftover before it is locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = stack.enter_context(_opened(folder))
            if flock(descriptor) is not False and folder.is_dir():
                return folder


def _age_s(folder: Path) -> float:
    """Seconds since the last change of a folder or of a file directly in it."""
    return time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def flock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Tries to lock an open file until it is closed.

    Returns:
        Whether the lock was taken; None if the file system has no locks, which is logged once.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOSYS, EINVAL, EBADF, EIO, …: network file systems differ
        _say_once(f"this file system has no locks ({error}): two processes may use one directory")
        return None
    return True


def flock_within(descriptor: int, seconds: float) -> bool | None:
    """Like `flock`, but retries until the lock is taken or the time is up."""
    until = time.monotonic() + seconds
    while (had := flock(descriptor)) is False:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return had


@functools.cache
def _say_once(warning: str) -> None:
    log.warning("%s", warning)
