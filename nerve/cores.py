"""The cores that a process may count on, and what is to be set before it imports what uses them;
light, as a sweep that starts trials needs it, too."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARE = "NERVE_CORES"
"""The environment variable that says how many of the cores are those of a trial beside others."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

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


@contextmanager
def uncollected() -> Iterator[None]:
    """For the first import of torch and Lightning: without Python's search for garbage, again and
    again in all that is there to stay, it takes a fifth less. Later searches leave that out, too.
    """
    if not gc.isenabled() or "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def multiply_in_one_thread() -> None:
    """Has NumPy's matrix products take one thread each, where the user did not say how many; to be
    called before NumPy is imported. Where several threads multiply at once, as in a report, those
    of OpenBLAS wait for each other, and take twice the time."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def share_among_trials() -> int | None:
    """Cores of this process, where it is one of several trials that run side by side."""
    share = os.environ.get(SHARE)
    return None if share is None else int(share)


def allowed() -> int:
    """Cores that the system lets this process use: the fewest of those that it may run on, those
    that its container may keep busy (rounded down), and those that a job of SLURM has for a task.
    """
    return int(max(1, min([_of_system(), *_quotas(), *_of_task()])))


def are_fewer() -> bool:
    """Whether they are fewer than libraries that count cores by themselves will find."""
    return allowed() < _of_system()


def memory() -> int:
    """Bytes of memory that this process may use with those beside it: what the host has, or fewer
    where a control group says so."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def _of_system() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not say


def _of_task() -> list[int]:
    told = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return [int(told)] if told.isdigit() and int(told) else []


def _quotas() -> Iterator[float]:
    """Cores' time per time that the control groups of this process allow, and those around them."""
    for is_first, folder in _groups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first else ("cpu.max",)
        yield from _quota(*(folder / name for name in names))


def _memory_limits() -> Iterator[int]:
    """Bytes that they allow."""
    for is_first, folder in _groups("memory"):
        with suppress(OSError, ValueError):  # of `max`: none
            name = "memory.limit_in_bytes" if is_first else "memory.max"
            yield int((folder / name).read_text())


def _groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """The folders of the control groups of this process that have a controller, and of those around
    them; with each, whether it is of the first version."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from ((False, folder) for folder in _upwards(_CGROUPS, path))
            elif controller in controllers.split(","):
                yield from ((True, folder) for folder in _upwards(_CGROUPS / controller, path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and those above it; within a container only the root's may be
    there, under whatever name it has outside."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _quota(*files: Path) -> Iterator[float]:
    """Of `max` and negative numbers: none."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int(number) for file in files for number in file.read_text().split())
        if quota > 0:
            yield quota / period
