"""The process that the jobs of a test are forked from; see lean/slurm_job.py."""

import ctypes
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from multiprocessing.connection import wait

from lean.slurm_job import LONGEST, MAIN
from processes import DIE_WITH_PARENT, as_if_started

SERVES_FOR_S = 3600.0

_context = multiprocessing.get_context("fork")


def serve(path: str) -> None:
    """Forks a process for each job that connects to this socket, and one that watches it."""
    import submitit.core.submission  # noqa: F401 - for all of them

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            job, _ = listener.accept()
            with job:
                _context.Process(target=_watch, args=(job,)).start()


def _watch(job: socket.socket) -> None:
    """Passes on the signals that the job gets, and tells it how its run ended. Kills the run if the
    job is gone."""
    ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
    told, streams, *_ = socket.recv_fds(job, LONGEST, 3)
    run = _context.Process(target=_run, args=(*json.loads(told), streams))
    run.start()
    for stream in streams:
        os.close(stream)
    while run.sentinel not in wait([job, run.sentinel]):
        received = job.recv(1)
        os.kill(run.pid, received[0] if received else signal.SIGKILL)
    run.join()
    job.send(str(run.exitcode).encode())


def _run(arguments: list[str], cwd: str, environment: dict[str, str], streams: list[int]) -> None:
    for descriptor, stream in enumerate(streams):
        os.dup2(stream, descriptor)
        os.close(stream)
    sys.stdout.reconfigure(write_through=True)  # like that of the job
    as_if_started(cwd, environment, dies_by=signal.SIGKILL)
    sys.argv = arguments
    runpy.run_module(MAIN, run_name="__main__", alter_sys=True)
