"""Files that are whole or not there, and locks that the system takes back from the dead."""

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
"""What a file system says that cannot sync; what was written is written all the same."""


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


def require_there(directory: Path) -> None:
    """Raises `StoreError` where the directory of a run at work is gone: a write that made it anew
    would leave one that looks like a run and lacks all that was stored."""
    if not directory.is_dir():
        raise StoreError(
            f"A run writes in its own directory; {directory} is not there any more: it was renamed "
            "or deleted while the run was at work, which stops. Leave it in its place until the "
            "run has ended; what was renamed is as it was, and can be resumed there."
        )


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
                    _sync(file)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def absolute(path: str | os.PathLike[str]) -> Path:
    """`path` from the current directory on, with `~` as the user's home."""
    return Path(os.path.expanduser(path)).absolute()


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory durable: a move or a removal survives a power cut.

    Where the file system does not do that for directories, it is said once.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):  # one that may be written, and not listed
        _say_once("names in a directory that cannot be opened may not survive a power cut")
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (*_NOT_SUPPORTED, errno.EBADF):
            raise
        _say_once("this file system does not sync directories: names may not survive a power cut")
    finally:
        os.close(descriptor)


def _sync(file: BinaryIO) -> None:
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
        _say_once("this file system does not sync files: the last ones may not survive a power cut")


def remove_temporaries(directory: Path) -> None:
    """Removes what writers that were killed left half-written in `directory`.

    Raises:
        StoreError: when the file system refuses.
    """
    with as_store_error(directory):
        for path in directory.glob(".*.tmp"):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def building_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, for what is moved to its place once it is whole.

    Who may read it follows the umask. It is removed at the end, and so are those of this prefix
    whose writers were killed before: no one has their lock or, where there are no locks, nothing in
    them has changed for a day.
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
    """A new folder that is locked until the end of `stack`."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        folder.mkdir()
        # Another writer may take it for a leftover before it is locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = stack.enter_context(_opened(folder))
            if flock(descriptor) is not False and folder.is_dir():
                return folder


def _age_s(folder: Path) -> float:
    """Since when nothing has changed in a folder, itself or a file directly in it."""
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
        Whether nobody else holds it; None where the file system has no locks that could tell, which
        is said once.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # ENOLCK, ENOSYS, EINVAL, EBADF, EIO, …: each network has its own
        _say_once(f"this file system has no locks ({error}): they keep no two processes apart")
        return None
    return True


def flock_within(descriptor: int, seconds: float) -> bool | None:
    """As `flock`, tried again until the lock is had or the time is over."""
    until = time.monotonic() + seconds
    while (had := flock(descriptor)) is False:
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return had


@functools.cache
def _say_once(warning: str) -> None:
    log.warning("%s", warning)
