"""Signals that ask a run to stop: noted immediately, obeyed once the run has saved."""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from nerve.errors import NotGatheredError, StoppedError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Sent by a user, by a dropped connection, or by a batch system before it preempts a job or its
time limit is reached."""

RESUMABLE_EXIT_STATUS = os.EX_TEMPFAIL
"""The exit status of a run that stopped before its end without a signal, and can be resumed."""

SLURM_KILLS_WITHIN_S = 30.0
"""The longest time between SIGTERM and SIGKILL if SLURM does not report it (KillWait, GraceTime):
SLURM's default."""

SLURM_IS_LATE_BY_S = 10.0
"""How much later than that SIGKILL may come."""

SLURM_ANSWERS_WITHIN_S = 10.0

SLURM_POLL_S = 10.0

SLURM_ENDS = re.compile(
    r"\bJobState=(PREEMPTED|REQUEUE\w*|CANCELLED|COMPLETING)\b|\bPreemptTime=\d"
)
"""What `scontrol show job` prints for a job that is about to be killed. A preempted job keeps
running during its grace time, and its PreemptTime is set."""


class Interrupted(SystemExit):
    """The run stopped before its end, and can be resumed.

    Args:
        reason: why it stopped.
        code: the exit status of the process.
        at_once: whether the process ends without waiting for anything.
    """

    def __init__(
        self, reason: str, code: int = RESUMABLE_EXIT_STATUS, *, at_once: bool = False
    ) -> None:
        super().__init__(code)
        self._reason = reason
        self.at_once = at_once

    @classmethod
    def by(cls, signum: int, *, at_once: bool = False) -> "Interrupted":
        """By a signal, with the exit status that shells expect."""
        return cls(f"stopped by {signal.Signals(signum).name}", 128 + signum, at_once=at_once)

    def __str__(self) -> str:
        return self._reason


class SignalsHandled:
    """Handles signals while the `with` block runs, and restores the previous handlers afterwards; a
    signal that was ignored (`nohup`) stays ignored."""

    def __init__(self) -> None:
        self._received: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        handlers = {signum: signal.getsignal(signum) for signum in self._signums()}
        self._before = {s: own for s, own in handlers.items() if own is not signal.SIG_IGN}
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def install(self) -> None:
        """Installs the handlers, replacing any that were installed in the meantime."""
        for signum in self._before:
            signal.signal(signum, self._note)

    def _signums(self) -> Iterable[int]:
        """The signals to handle."""
        raise NotImplementedError

    def _note(self, signum: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignals(SignalsHandled):
    """Notes signals that ask to stop while the `with` block runs, and restores their handlers.

    Before `defer` is called, such a signal raises `Interrupted` immediately; afterwards the program
    checks `received` where it can stop. A second Ctrl-C raises it immediately, too, and further
    signals are only noted. KeyboardInterrupt is not used, because Lightning turns it into another
    error. Outside the main thread, where Python does not allow signal handlers, nothing is
    installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred = False
        self._is_held = False
        self._raised: Interrupted | None = None
        self._is_handed_on = False

    def __exit__(self, *exception: object) -> None:
        super().__exit__()
        if isinstance(exception[1], Interrupted):
            self.hand_on()

    @property
    def received(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._received)

    def defer(self) -> None:
        """From now on, signals are only noted; also reinstalls handlers that were replaced."""
        self._deferred = True
        self.install()

    def hold(self) -> None:
        """From now on, all signals are only noted, because little is left to do."""
        self._is_held = True

    @contextmanager
    def of_all(self) -> Iterator[None]:
        """Within the block, this process is also interrupted if another one was asked to stop. If
        this one was asked to stop, an error because another one has ended is replaced; so is any
        error after a signal has interrupted this process at once, since torch replaces an exception
        that is raised while it writes a file.

        Raises:
            Interrupted: in place of the error.
        """
        try:
            yield
        except Exception as error:
            if self._raised is not None:
                raise self._raised from error
            if not isinstance(error, NotGatheredError):
                raise
            if self._received:
                raise Interrupted.by(self._received[0]) from error
            if isinstance(error, StoppedError):
                raise Interrupted(str(error)) from error
            raise

    def stop(self) -> NoReturn:
        """Ends training by raising `Interrupted`, also if another process received the signal."""
        raise Interrupted.by(self._received[0] if self._received else signal.SIGTERM)

    def hand_on(self) -> None:
        """Passes the noted signals to their previous handlers, now that everything is saved.

        submitit's handler counts the timeout, requeues the job, and exits. The command that it runs
        for that may be killed with the rest of the job before it returns. SLURM itself requeues a
        preempted job only if the job still exists when its grace time ends, so after SIGTERM a job
        waits to be killed for as long as SLURM reports that it will be.
        """
        if self._is_handed_on:
            return
        self._is_handed_on = True
        is_ended = False
        for signum in self._received:
            handler = self._before.get(signum)
            if callable(handler) and handler is not signal.default_int_handler:
                try:
                    handler(signum, None)
                except subprocess.CalledProcessError as error:
                    if error.returncode >= 0:
                        raise
                    is_ended = True
                    log.warning("%s, because SLURM kills the whole job to requeue it", str(error))
        job = os.environ.get("SLURM_JOB_ID")
        if job and (is_ended or signal.SIGTERM in self._received):
            _wait_for_kill(job)

    def _signums(self) -> Iterable[int]:
        return STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        is_second = signum == signal.SIGINT and signum in self._received
        if signum not in self._received:
            self._received.append(signum)
        if self._is_held:
            return
        if is_second or not self._deferred:
            self._is_held = is_second
            self._raised = Interrupted.by(signum, at_once=is_second)
            raise self._raised
        more = " (press Ctrl-C again to exit immediately)" if signum == signal.SIGINT else ""
        text = f"\n{signal.Signals(signum).name}: stopping at the end of this step{more}\n"
        os.write(2, text.encode())  # sys.stderr may be in the middle of a write


def _wait_for_kill(job: str) -> None:
    """Waits while SLURM reports that it is ending `job`; returns at once if SIGTERM came from
    elsewhere."""
    output = _output_of("scontrol", "show", "job", job)
    if SLURM_ENDS.search(output):
        log.warning("waiting for SLURM to kill this job, so that it requeues the job")
        until = time.monotonic() + _kills_within_s(output) + SLURM_IS_LATE_BY_S
        while time.monotonic() < until and SLURM_ENDS.search(output):
            time.sleep(SLURM_POLL_S)
            output = _output_of("scontrol", "show", "job", job)


def _kills_within_s(job: str) -> float:
    """Seconds from SIGTERM to SIGKILL: KillWait, and for a preempted job also the GraceTime of its
    partition or QOS.

    Args:
        job: the output of `scontrol show job`.
    """
    kill = re.search(r"\bKillWait\s*=\s*(\d+)", _output_of("scontrol", "show", "config"))
    wait_s = float(kill[1]) if kill else SLURM_KILLS_WITHIN_S
    if not re.search(r"PREEMPTED|PreemptTime=\d", job):
        return wait_s
    graces = [0.0]
    if partition := re.search(r"\bPartition=(\S+)", job):
        output = _output_of("scontrol", "show", "partition", partition[1])
        graces += [float(s) for s in re.findall(r"\bGraceTime=(\d+)", output)]
    if qos := re.search(r"\bQOS=(\S+)", job):
        output = _output_of("sacctmgr", "-nP", "show", "qos", qos[1], "format=GraceTime")
        graces += [3600 * float(h) + 60 * float(m) + float(s) for h, m, s in _CLOCK.findall(output)]
    return wait_s + max(graces)


_CLOCK = re.compile(r"^(\d+):(\d+):(\d+)$", re.MULTILINE)


def _output_of(*command: str) -> str:
    """The output of a SLURM command; empty if it fails to answer."""
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_ANSWERS_WITHIN_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return output.stdout
