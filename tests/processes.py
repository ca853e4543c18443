"""Processes that begin with all imported that a run needs.

They are forked from one process that has imported it once, and that the first of them starts: to
import Lightning takes five seconds of a core. What a process of its own proves, such as locks,
signals, kills and collectives, they prove as well. That the commands start from nothing is shown
where they are called so: in test_install.py, by the jobs of slurm/ and by the trials of sweeps.
"""

import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

PRELOADED = ("nerve.cli.run", "nerve.cli.experiment.run", "nerve.cli.sweep.sweeper")
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)

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
) -> BaseProcess:
    """Calls a function of a module that can be imported by its name, in a process of its own.

    Args:
        cwd: its working directory.
        log: the file that gets its stdout and stderr.
        environment: its whole environment; this one's, if it is None. `PYTHONPATH` counts.

    Returns:
        the process; `exitcode` is as that of a command.
    """
    values = dict(os.environ if environment is None else environment)
    process = _context.Process(
        target=_begin, args=(function, arguments, str(cwd), str(log), values)
    )
    with pytest.MonkeyPatch.context() as patch:  # for the one that all are forked from
        patch.setenv("PYTHONPATH", lean_path())
        multiprocessing.forkserver.ensure_running()
    process.start()
    return process


def lean_path(*others: Path) -> str:
    """PYTHONPATH with `LEAN` and these folders before what it has."""
    return os.pathsep.join(map(str, filter(None, [*others, LEAN, os.environ.get("PYTHONPATH")])))


def nerve_run(arguments: Sequence[str], **where: Any) -> BaseProcess:
    """`nerve-run` with these arguments; the rest is as `start` has it."""
    return start(_nerve_run, [*map(str, arguments)], **where)


def ranks(n: int, arguments: Sequence[str], cwd: Path, **environment: str) -> tuple[list[int], str]:
    """`nerve-run` in `n` processes that are one run and that another program started; their exit
    statuses, and what they printed.

    Args:
        environment: is added to this one's.
    """
    logs = [cwd / f"rank{rank}.log" for rank in range(n)]
    processes = []
    for log, values in zip(logs, _environments(n), strict=True):
        log.unlink(missing_ok=True)
        values |= environment
        processes.append(nerve_run(arguments, cwd=cwd, log=log, environment=values))
    statuses = [ended(process) for process in processes]
    return statuses, "\n".join(log.read_text() for log in logs)


def together(function: Callable[[int, str], None], n: int, folder: Path) -> None:
    """Calls `function(rank, folder)` in `n` processes at once; fails if one of them does."""
    logs = [folder / f"{function.__name__}{rank}.log" for rank in range(n)]
    processes = [
        start(function, rank, str(folder), cwd=folder, log=log, environment=values)
        for rank, (log, values) in enumerate(zip(logs, _environments(n), strict=True))
    ]
    statuses = [ended(process) for process in processes]
    assert statuses == [0] * n, "\n".join(log.read_text() for log in logs)


def _environments(n: int) -> list[dict[str, str]]:
    """What tells `n` processes that they are one group."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"}
    return [os.environ | group | {"LOCAL_RANK": str(rank)} for rank in range(n)]


def ended(process: BaseProcess, seconds: float = 200) -> int:
    """Waits for the end of a process; its exit status."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still there after {seconds} s")
    return process.exitcode


def _begin(
    function: Callable[..., None],
    arguments: Sequence[Any],
    cwd: str,
    log: str,
    environment: dict[str, str],
) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(log, "a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
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
