"""A lock on an open file that the system takes back when its holder dies."""

import errno
import fcntl
import logging
import time

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
