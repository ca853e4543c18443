"""The peak of a process's memory."""

import resource
from contextlib import suppress
from pathlib import Path


def host_peak() -> int:
    """The most bytes that this process has had in memory.

    `ru_maxrss`, which is taken where the system does not say VmHWM, begins with the peak of the
    process that started this one.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
