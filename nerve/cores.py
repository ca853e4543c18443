"""The cores that a process may count on; light, as a sweep that starts trials needs it, too."""

import os

SHARE = "NERVE_CORES"
"""The environment variable that says how many of the cores are those of a trial beside others."""

SPINS = "10000"
"""How often a thread of OpenMP looks for work before it sleeps, about a fifth of a millisecond.

Left alone it looks for some milliseconds, and takes the core from whoever else wants it: beside two
busy processes a run then takes ten times as long. One that sleeps at once is late when the cores
are idle.
"""


def spin_briefly() -> None:
    """Has the threads of OpenMP sleep soon, where the user did not say how they wait; to be called
    before torch is imported, which reads it then."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


def share_among_trials() -> int | None:
    """Cores of this process, where it is one of several trials that run side by side."""
    share = os.environ.get(SHARE)
    return None if share is None else int(share)


def allowed() -> int:
    """Cores that the system lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not say
