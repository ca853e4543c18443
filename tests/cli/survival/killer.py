"""Runs that are killed, from a process that has composed them and forks one for each piece.

Every other piece is killed after a random time, the others before or after the k-th change that
they make to the file system. Pieces are short, so that most of them are killed.
"""

import faulthandler
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write
from processes import ENDS_WITHIN_S, tell_stacks
from support import composed

from nerve.cli.experiment.run import run_experiment


def kill(look: Connection, seed: int, n_kills: int, arguments: Sequence[str]) -> None:
    """Runs once undisturbed in `whole`, then in pieces in `pieces0`, `pieces1` and so on.

    After each piece it sends its directory and the kills so far, and waits until what is left has
    been looked at. It ends with a run that was done after the last kill.
    """
    faulthandler.cancel_dump_traceback_later()  # each piece has one of its own, which this forbids
    config = composed(*arguments, with_hydra=True)
    HydraConfig.instance().set_config(config)
    with read_write(config), open_dict(config):
        del config["hydra"]
    began = time.monotonic()
    assert _end_of(_piece(config, "whole", None)) == 0, Path("whole.log").read_text()
    duration = time.monotonic() - began
    rng, kills, runs, status, directory = random.Random(seed), 0, 0, 0, ""
    while kills < n_kills or status:
        if not status:
            directory, runs = f"pieces{runs}", runs + 1
        if kills >= n_kills:
            child = _piece(config, directory, None)
        elif rng.random() < 0.5:
            child = _piece(config, directory, rng.randrange(1, 150))
        else:
            child = _piece(config, directory, None)
            time.sleep(rng.uniform(0.05, 0.4) * duration)
            os.kill(child, signal.SIGKILL)
        status = _end_of(child)
        assert status in (0, -signal.SIGKILL), Path(f"{directory}.log").read_text()
        kills += status != 0
        look.send((directory, kills))
        look.recv()
    look.close()


def _piece(config: DictConfig, directory: str, moment: int | None) -> int:
    """The process that goes on with the run, and kills itself at that change."""
    child = os.fork()
    if child:
        return child
    log = os.open(f"{directory}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tell_stacks(ENDS_WITHIN_S)
    hydra_config = HydraConfig.get()
    with read_write(hydra_config):
        hydra_config.runtime.output_dir = os.path.abspath(directory)
    if moment is not None:
        _count_down(moment)
    status = 1
    try:
        run_experiment(config, hydra_config)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def _count_down(left: int) -> None:
    def tick() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            result = change(*args, **kwargs)
            tick()
            return result

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "open"), (Path, "unlink")):
        setattr(owner, name, dying(getattr(owner, name)))


def _end_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_probes(n_kills: int) -> None:
    """What test_probe_kills.py has done in a process that is forked from one to which transformers
    is hidden."""
    import sitecustomize

    sitecustomize.reveal()
    from cli.survival.test_probe_kills import kill_pieces

    kill_pieces(n_kills)
