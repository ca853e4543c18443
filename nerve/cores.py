"""The cores that a process may count on; light, as a sweep that starts trials needs it, too."""

import os

SHARE = "NERVE_CORES"
"""The environment variable that says how many of the cores are those of a trial beside others."""


def share_among_trials() -> int | None:
    """Cores of this process, where it is one of several trials that run side by side."""
    share = os.environ.get(SHARE)
    return None if share is None else int(share)


def allowed() -> int:
    """Cores that the system lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not say
