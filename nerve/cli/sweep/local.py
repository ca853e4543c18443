"""Trials of a sweep on this machine, each in its own process: starts, watches and stops them."""

import contextlib
import os
import signal
import site
import subprocess
import sys
import sysconfig
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nerve import cores
from nerve.cli.config.compose import encoded
from nerve.cli.sweep.grid import Trial
from nerve.cli.sweep.worker import record_end
from nerve.errors import NerveError, StoreError
from nerve.files import require_there
from nerve.training.signals import SignalsHandled

GRACE_S = 120.0
"""How long a trial may take to save when it is asked to stop; then it is killed."""

COMMAND = [sys.executable, "-P", "-c", "from nerve.cli.entry import trial; trial()"]
POLL_S = 0.1
LOG_NAME = "output.log"
SWEEP_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OUTSIDE_SIGNALS = (signal.SIGKILL, *SWEEP_STOP_SIGNALS)
"""Signals that do not indicate an error of the trial they end."""

STOPPED_STATUSES = (128 + signal.SIGINT, -signal.SIGINT)
"""The exit statuses of a trial that stopped on request; the second one is that of a process that
had just started."""


class KilledError(NerveError):
    """The process of a trial was killed."""


class CrashedError(NerveError):
    """The process of a trial ended by itself before its run did."""


class TimeLimitError(NerveError):
    """A trial took longer than its time limit."""


class StopRequests(SignalsHandled):
    """Counts the requests to stop that this process receives while the `with` block runs.

    A signal that is ignored (`nohup`) stays ignored.
    """

    @property
    def received(self) -> list[int]:
        """The signals received so far."""
        return self._received

    def _signums(self) -> Iterable[int]:
        return [each for each in SWEEP_STOP_SIGNALS if signal.getsignal(each) != signal.SIG_IGN]

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received.append(signum)


def run_here(
    trials: Iterable[Trial],
    n_at_once: int,
    timeout_s: float | None,
    starting: Callable[[Trial], None],
    ended: Callable[[Trial], None],
) -> int | None:
    """Runs the trials, in order, until all have ended or this process is asked to stop.

    When asked to stop (Ctrl-C), it passes the request on to the running trials, which save, and
    starts no more; if asked again, they end without saving. How each trial ended is recorded in its
    directory.

    Args:
        trials: not running yet, each in its own directory.
        n_at_once: how many run side by side. Of several, each writes to output.log in its directory
            and gets its share of the CPU cores, and one of the GPUs in turn.
        timeout_s: how long a trial may take; then it is asked to stop.
        starting: called with each trial before it starts.
        ended: called with each trial once it has ended.

    Returns:
        The signal that asked to stop, if any.
    """
    waiting, running = deque(trials), list["_Process"]()
    n_at_once = min(n_at_once, len(waiting))
    places = deque(range(n_at_once))
    with StopRequests() as requests:
        while running or (waiting and not requests.received):
            while waiting and len(running) < n_at_once and not requests.received:
                trial = waiting.popleft()
                starting(trial)
                try:
                    n_sharing = min(n_at_once, len(running) + 1 + len(waiting))
                    room = _Room(places[0], n_sharing, has_log=n_at_once > 1)
                    running.append(_Process(trial, room, timeout_s))
                    places.popleft()
                except (OSError, StoreError) as error:
                    trial.start_error = f"its process could not be started: {error}"
                    ended(trial)
            time.sleep(POLL_S)
            for process in running.copy():
                if process.has_ended(len(requests.received)):
                    running.remove(process)
                    places.append(process.room.place)
                    ended(process.trial)
    return requests.received[0] if requests.received else None


@dataclass(frozen=True)
class _Room:
    """The part of this machine that a trial gets.

    Attributes:
        place: a slot that no other running trial has, from 0.
        n_sharing: how many trials share the cores.
        has_log: whether it writes to a file of its own.
    """

    place: int
    n_sharing: int
    has_log: bool


class _Process:
    """A running trial, in one of the slots for those that run at once."""

    def __init__(self, trial: Trial, room: _Room, timeout_s: float | None) -> None:
        self.trial = trial
        self.room = room
        self._timeout_s = timeout_s
        self._began = time.monotonic()
        self._requests = 0
        self._to_be_killed_at: float | None = None
        self._error: NerveError | None = None
        self._n_starts = trial.run.reload().n_starts  # it may have waited for a long time
        self._popen = _start(trial, room)

    def has_ended(self, requests: int) -> bool:
        """Whether the trial has ended; if it has not but should, asks it to.

        Args:
            requests: how often the sweep has been asked to stop.
        """
        if self._has_exited():
            self._settle()
            return True
        now = time.monotonic()
        if requests > self._requests:
            self._requests = requests
            self._ask_to_stop(now)
        elif self._timeout_s is not None and now - self._began > self._timeout_s:
            self._timeout_s = None
            self._error = TimeLimitError(
                f"stopped after {_minutes(now - self._began)}; the limit of "
                "hydra.sweeper.timeout_min"
            )
            self._ask_to_stop(now)
        elif self._to_be_killed_at is not None and now > self._to_be_killed_at:
            self._to_be_killed_at = None
            self._error = KilledError(
                f"{self._error or 'stopped'}; it did not end within {GRACE_S:g} s of being asked to"
            )
            self._kill()
        return False

    def _ask_to_stop(self, now: float) -> None:
        self._to_be_killed_at = self._to_be_killed_at or now + GRACE_S
        # Not SIGTERM: in a SLURM job, a run thinks that it came from the scheduler. Not through
        # Popen, which collects the exit status of a process that has just ended.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._popen.pid, signal.SIGINT)

    def _has_exited(self) -> bool:
        """Whether the process has ended. Its status is not collected, so that its process id stays
        reserved: otherwise the system may give the id to another process."""
        if not hasattr(os, "waitid"):  # macOS
            return self._popen.poll() is not None
        try:
            how = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._popen.pid, how) is not None
        except ChildProcessError:  # other code in this process has collected it
            return True

    def _kill(self) -> None:
        """Kills whatever is left of the trial, including data workers, which may hold the run's
        lock."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def _settle(self) -> None:
        """Makes sure that the directory records how the trial ended."""
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        self._kill()
        status = self._popen.wait()
        try:
            require_there(self.trial.directory)
            with self.trial.run.locked():
                if not self._is_recorded(status):
                    error = self._error or _error(status)
                    run_status = "failed" if isinstance(error, CrashedError) else "interrupted"
                    record_end(self.trial.run, self.trial.values(), run_status, error)
        except StoreError as error:  # nothing can be written, or another process continues it
            self.trial.start_error = str(error)

    def _is_recorded(self, status: int) -> bool:
        """Whether the run itself has fully recorded how it ended."""
        run = self.trial.run
        run_status = run.record.run_status if run.record else None
        if run.n_starts == self._n_starts:  # it never began
            was_stopped = status in STOPPED_STATUSES and self._error is None
            return was_stopped or run_status in ("done", "failed")
        # If it was stopped for a reason, only this process knows it.
        return run_status != "running" and (run_status != "interrupted" or self._error is None)


def _start(trial: Trial, room: _Room) -> "subprocess.Popen[bytes]":
    environment, line = os.environ | _own_paths() | _share(room), encoded(trial.config)
    trial.directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = None
        if room.has_log:
            log = stack.enter_context(open(trial.directory / LOG_NAME, "ab"))
        popen = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log and subprocess.STDOUT,
            env=environment,
            process_group=0,  # Ctrl-C goes to the sweep, which passes it on once
        )
    assert popen.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        popen.stdin.write(line)
        popen.stdin.flush()
    return popen


def _share(room: _Room) -> dict[str, str]:
    """Environment variables that tell a trial which cores and GPUs it may use."""
    share: dict[str, str] = {}
    if room.n_sharing > 1:
        n_threads = str(max(1, cores.allowed() // room.n_sharing))
        share[cores.SHARE] = n_threads
        for pool in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            share[pool] = os.environ.get(pool, n_threads)
    if room.has_log and (gpus := _gpus()):
        share["CUDA_VISIBLE_DEVICES"] = gpus[room.place % len(gpus)]
    return share


def _own_paths() -> dict[str, str]:
    """Makes a trial find the same modules as this process, without the paths that every process of
    this Python has: a trial may call another Python, for which this one's library would be
    wrong."""
    everyones = {os.path.realpath(path) for path in sysconfig.get_paths().values()}
    for name in ("stdlib", "platstdlib"):
        library = sysconfig.get_path(name)
        everyones.add(os.path.realpath(os.path.join(library, "lib-dynload")))
        archive = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
        everyones.add(os.path.realpath(os.path.join(os.path.dirname(library), archive)))
    everyones.update(map(os.path.realpath, (*site.getsitepackages(), site.getusersitepackages())))
    paths = [os.path.abspath(path) for path in sys.path]
    own = [path for path in paths if os.path.realpath(path) not in everyones]
    return {"PYTHONPATH": os.pathsep.join(own)}


def _gpus() -> list[str]:
    """The names of the GPUs visible to CUDA, found without importing torch, which takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _error(status: int) -> NerveError:
    """Describes an exit status, for a process that did not report an error itself."""
    if status >= 0:
        return CrashedError(f"its process ended with exit status {status} before the run did")
    name = signal.Signals(-status).name
    if -status not in OUTSIDE_SIGNALS:
        why = ", which a failed GPU can cause: its output says more" if name == "SIGABRT" else ""
        return CrashedError(f"its process ended with {name}{why}")
    why = ", by hand or by the system for lack of memory" if -status == signal.SIGKILL else ""
    return KilledError(f"its process was killed ({name}){why}")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.3g} min"
