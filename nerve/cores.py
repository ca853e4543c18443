"""The cores that a process may use, and what to set before importing the libraries that use them;
imports little, because a sweep that starts trials needs it, too."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SHARE = "NERVE_CORES"
"""The environment variable with the number of cores of a trial that runs next to others."""

_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

SPINS = "10000"
"""How often an OpenMP thread looks for work before it sleeps, about a fifth of a millisecond.

By default it spins for some milliseconds and keeps the core from other threads: next to two busy
processes, a run then takes ten times as long. A thread that sleeps immediately wakes up late even
if the cores are idle.
"""


def spin_briefly() -> None:
    """Makes OpenMP threads sleep soon, unless the user configured how they wait; must be called
    before torch is imported, which reads the setting."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def uncollected() -> Iterator[None]:
    """Disables garbage collection during the first import of torch and Lightning, which makes it a
    fifth faster. Later collections skip the imported objects, which are there to stay."""
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
    """Makes NumPy's matrix products use one thread each, unless the user configured it; must be
    called before NumPy is imported. If several threads multiply at once, as in a report, those of
    OpenBLAS wait for each other and take twice as long."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def share_among_trials() -> int | None:
    """The number of cores of this process if it is one of several concurrent trials, else None."""
    share = os.environ.get(SHARE)
    return None if share is None else int(share)


def allowed() -> int:
    """The number of cores that this process may use: the smallest of its CPU affinity, the CPU
    quota of its container (rounded down), and the cores per task of its SLURM job."""
    return int(max(1, min([_of_system(), *_quotas(), *_of_task()])))


def are_fewer() -> bool:
    """Whether this is fewer than the cores that libraries detect by themselves."""
    return allowed() < _of_system()


def memory() -> int:
    """Bytes of memory that this process and its neighbors may use: the host's memory, or the limit
    of a control group."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_memory_limits()])


def _of_system() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not say


def _of_task() -> list[int]:
    value = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return [int(value)] if value.isdigit() and int(value) else []


def _quotas() -> Iterator[float]:
    """The numbers of cores that the control groups of this process, and their parents, allow."""
    for is_first, folder in _groups("cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if is_first else ("cpu.max",)
        yield from _quota(*(folder / name for name in names))


def _memory_limits() -> Iterator[int]:
    """The bytes of memory that these control groups allow."""
    for is_first, folder in _groups("memory"):
        with suppress(OSError, ValueError):  # `max` means no limit
            name = "memory.limit_in_bytes" if is_first else "memory.max"
            yield int((folder / name).read_text())


def _groups(controller: str) -> Iterator[tuple[bool, Path]]:
    """The folders of the control groups of this process with this controller, and of their parents;
    with each, whether it is of cgroup version 1."""
    with suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield from ((False, folder) for folder in _upwards(_CGROUPS, path))
            elif controller in controllers.split(","):
                yield from ((True, folder) for folder in _upwards(_CGROUPS / controller, path))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """The folder of a control group and those above it. Within a container, only the root may
    exist, because the path is the one outside of it."""
    folder = root / path.lstrip("/")
    while folder != root and root in folder.parents:
        yield folder
        folder = folder.parent
    yield root


def _quota(*files: Path) -> Iterator[float]:
    """The quota in cores; nothing for `max` and negative numbers."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int(number) for file in files for number in file.read_text().split())
        if quota > 0:
            yield quota / period
