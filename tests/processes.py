"""Starts processes in which everything that a run needs is already imported.

They are forked from one process that has imported it once and that the first of them starts,
because importing Lightning takes five seconds of a core. They prove the same about locks, signals,
kills and collectives as processes started from scratch. Commands are started from scratch in
test_install.py, by the jobs of slurm/ and by the trials of sweeps.
"""

import atexit
import ctypes
import faulthandler
import gc
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PRELOADED = ("nerve.cli.run", "nerve.cli.experiment.run", "nerve.cli.sweep.sweeper", "forked")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

ENDS_WITHIN_S = 200.0
"""How long a process may take; then it is killed, and its log has the stacks of its threads."""

FOLLOWS_WITHIN_S = 60.0
"""How long the others of a group may take once one of them has failed."""

LEAN = Path(__file__).with_name("lean")
"""On PYTHONPATH, it hides what a run does not need; an interpreter then starts in less time."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


def start(
    function: Callable[..., None],
    *arguments: Any,
    cwd: Path,
    log: Path,
    environment: Mapping[str, str] | None = None,
    within_s: float = ENDS_WITHIN_S + FOLLOWS_WITHIN_S,
) -> BaseProcess:
    """Calls a function of a module that can be imported by its name, in a process of its own.

    Args:
        cwd: its working directory.
        log: the file that gets its stdout and stderr.
        environment: its whole environment; this one's, if it is None. `PYTHONPATH` counts.
        within_s: ends itself after so long, whatever becomes of this process.

    Returns:
        the process; `exitcode` is as that of a command, and its name that of the log.
    """
    values = dict(os.environ if environment is None else environment)
    how = function, arguments, str(cwd), str(log), values, within_s
    process = _context.Process(target=_begin, args=how, name=str(log))
    with pytest.MonkeyPatch.context() as patch:  # for the one that all are forked from
        patch.setenv("PYTHONPATH", lean_path(Path(__file__).parent))
        multiprocessing.forkserver.ensure_running()
    process.start()
    return process


def lean_path(*others: Path) -> str:
    """PYTHONPATH with `LEAN` and these folders in front."""
    return os.pathsep.join(map(str, filter(None, [*others, LEAN, os.environ.get("PYTHONPATH")])))


def nerve_run(arguments: Sequence[str], **where: Any) -> BaseProcess:
    """Runs `nerve-run` with these arguments; the others are as in `start`."""
    return start(_nerve_run, [*map(str, arguments)], **where)


def ranks(n: int, arguments: Sequence[str], cwd: Path, **environment: str) -> tuple[list[int], str]:
    """`nerve-run` in `n` processes that are one run and that another program started; their exit
    statuses, and what they printed.

    Args:
        environment: is added to this one's.
    """
    logs = [cwd / f"rank{rank}.log" for rank in range(n)]
    for log in logs:
        log.unlink(missing_ok=True)
    with _environments(n) as environments:
        statuses = _all_ended(
            [
                nerve_run(arguments, cwd=cwd, log=log, environment=values | environment)
                for log, values in zip(logs, environments, strict=True)
            ]
        )
    return statuses, "\n".join(log.read_text() for log in logs)


def together(function: Callable[[int, str], None], n: int, folder: Path) -> None:
    """Calls `function(rank, folder)` in `n` processes at once; fails if one of them does, soon
    after it, or if one does not end, with what all of them printed."""
    logs = [folder / f"{function.__name__}{rank}.log" for rank in range(n)]
    with _environments(n) as environments:
        statuses = _all_ended(
            [
                start(function, rank, str(folder), cwd=folder, log=log, environment=values)
                for rank, (log, values) in enumerate(zip(logs, environments, strict=True))
            ]
        )
    assert statuses == [0] * n, "\n".join(log.read_text() for log in logs)


@contextmanager
def held_port() -> Iterator[str]:
    """A port of this host that nobody else is given within the block, and that whoever is told of
    it can listen at.

    One that was only free a moment ago may have been given to a stranger since; then the first of a
    group cannot listen, or the others wait at the stranger's.
    """
    with closing(socket.socket()) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # beside one that listens
        holder.bind(("127.0.0.1", 0))
        yield str(holder.getsockname()[1])


@contextmanager
def _environments(n: int) -> Iterator[list[dict[str, str]]]:
    """The environment variables that tell `n` processes that they form one group."""
    with held_port() as port:
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
        yield [os.environ | group | {"LOCAL_RANK": str(rank)} for rank in range(n)]


def ended(process: BaseProcess, seconds: float = ENDS_WITHIN_S) -> int:
    """Waits for the end of a process and returns its exit status."""
    return _all_ended([process], seconds)[0]


def _all_ended(processes: Sequence[BaseProcess], seconds: float = ENDS_WITHIN_S) -> list[int]:
    """Waits for the end of processes; their exit statuses. Where one fails, the others may wait for
    it for ever: they get a shorter time.

    Raises:
        TimeoutError: for those that did not end, which are killed; with what all of them printed,
            and where the threads of those stood.
    """
    until = time.monotonic() + seconds
    while left := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + FOLLOWS_WITHIN_S)
        sentinels = [process.sentinel for process in left]
        if not multiprocessing.connection.wait(sentinels, max(0.0, until - time.monotonic())):
            for process in left:
                _kill(process)
            logs = "\n".join(Path(process.name).read_text() for process in processes)
            raise TimeoutError(f"{len(left)} of {len(processes)} did not end in time:\n{logs}")
    return [process.exitcode for process in processes if process.exitcode is not None]


def _kill(process: BaseProcess) -> None:
    """Kills a process that is stuck, after it has printed its stacks."""
    if process.pid is not None:
        os.kill(process.pid, signal.SIGQUIT)
    process.join(0.5)
    process.kill()
    process.join()


@atexit.register
def _kill_what_is_left() -> None:
    """Kills the remaining processes, because multiprocessing would wait for them without limit."""
    for process in multiprocessing.active_children():
        process.kill()


def tell_stacks(seconds: float) -> None:
    """Makes this process print the stacks of its threads on SIGQUIT, and after this many seconds,
    which also ends it whatever its threads are doing. In a process forked from such a process, this
    cannot be set up again."""
    faulthandler.register(signal.SIGQUIT, all_threads=True)
    faulthandler.dump_traceback_later(seconds, exit=True)


def _begin(
    function: Callable[..., None],
    arguments: Sequence[Any],
    cwd: str,
    log: str,
    environment: dict[str, str],
    within_s: float,
) -> None:
    gc.freeze()  # what was imported; else each collection, such as accelerate asks for, takes .3 s
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    tell_stacks(within_s)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    import torch
    from lightning.fabric.utilities.rank_zero import _get_rank, rank_zero_only

    torch.set_num_threads(1)
    rank_zero_only.rank = _get_rank() or 0  # as Lightning reads it, which it does when imported
    try:
        function(*arguments)
    except Exception:  # multiprocessing prints what it knows of it, and this is more
        traceback.print_exc()
        sys.exit(1)


def _nerve_run(arguments: list[str]) -> None:
    from nerve.cli.run import main

    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = ["nerve-run", *arguments]
    main()
