"""Who starts the processes of a run, and those that one of them starts itself."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from nerve.errors import ConfigError, NotGatheredError
from nerve.measuring.departures import Exit
from nerve.training.signals import STOP_SIGNALS, StopSignals

ENDS_WITHIN_S = 5.0
"""How long a process may take to end when it is asked to; then it is killed."""

_PARENT = "NERVE_PARENT"
"""The environment variable with the id of the process that started this one."""


def environment_of(is_alone: bool) -> ClusterEnvironment:
    """What started the processes of a run: chosen as Lightning does, except that a run of a single
    process ignores the tasks of the job around it."""
    if is_alone:
        return LightningEnvironment()
    if TorchElasticEnvironment.detect():  # torchrun, also inside a job of SLURM
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect():
        # Lightning's own requeueing would interfere with ours and submitit's.
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:  # the number of tasks does not fit
            raise ConfigError(f"SLURM must start one task per device: {error}") from error
    for kind in (LSFEnvironment, MPIEnvironment):
        if kind.detect():
            return kind()
    return LightningEnvironment()


class Children:
    """The processes of a run that this one starts: none before `start`."""

    def __init__(self) -> None:
        self._launcher: _SubprocessScriptLauncher | None = None

    def start(self, launcher: _SubprocessScriptLauncher) -> None:
        """Starts them. Ctrl-C takes effect in them only once they call `take_ctrl_c`.

        Args:
            launcher: starts the same command once for each further device of this node.
        """
        self._launcher = launcher
        with _as_parent():
            launcher._call_children_scripts()

    def ended(self) -> dict[int, int]:
        """The exit statuses of those that have ended, by their rank in the run."""
        statuses = {self._first + i: each.poll() for i, each in enumerate(self._processes)}
        return {rank: status for rank, status in statuses.items() if status is not None}

    def kill(self) -> None:
        """Kills those that have not ended."""
        for each in self._processes:
            each.kill()  # does nothing to one that has ended

    def end(self) -> int:
        """Asks them to end, and kills those that have not after `ENDS_WITHIN_S` seconds or when
        this process is asked to stop; returns the number of processes.

        Raises:
            Interrupted: if it is asked to stop.
        """
        until = time.monotonic() + ENDS_WITHIN_S
        with StopSignals():
            try:
                for each in self._processes:
                    each.terminate()
                for each in self._processes:
                    each.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                pass
            finally:
                self.kill()
        return len(self._processes)

    @property
    def _processes(self) -> list[subprocess.Popen[bytes]]:
        return self._launcher.procs if self._launcher else []  # it makes a new list when it starts

    @property
    def _first(self) -> int:
        """The rank of the first of them; that of this process is one less."""
        of = self._launcher
        return of.cluster_environment.node_rank() * of.num_processes + 1 if of else 1


def exit_of(status: int) -> Exit:
    """An exit status in words, and whether a signal that asks to stop ended the process: before it
    could handle the signal, or with the exit status that shells use for it."""
    known = {each.value: each.name for each in signal.Signals}
    how = f"ended with status {status}"
    if status < 0:
        how = f"was killed by {known.get(-status, f'signal {-status}')}"
    return Exit(how, any(status in (-each, 128 + each) for each in STOP_SIGNALS))


def take_ctrl_c() -> None:
    """In a process that another process of the run started, unblocks SIGINT; one that is already
    pending is delivered now."""
    if _PARENT in os.environ:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def has_lost_parent() -> bool:
    """Whether another process of the run started this one, and has ended."""
    return os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid())


def require_parent() -> None:
    """Raises an error if another process of the run started this one and has ended.

    Raises:
        NotGatheredError: if it has, without waiting for this one.
    """
    if has_lost_parent():
        raise NotGatheredError(
            "A run needs all of its processes; the first one ended without giving a reason."
        )


@contextmanager
def _as_parent() -> Iterator[None]:
    """Within the block, processes that are started get the id of this one, and Ctrl-C is blocked in
    them: a terminal would send it to them, too, in the middle of their imports."""
    os.environ[_PARENT] = str(os.getpid())
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # which they inherit
    try:
        yield
    finally:
        del os.environ[_PARENT]
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)  # raises what has come meanwhile
