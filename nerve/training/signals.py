"""Signals that ask a run to stop: noticed at once, obeyed once the run has saved."""

import logging
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any, NoReturn, Self

log = logging.getLogger(__name__)

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What asks a run to stop: a user, a connection that drops, a batch system before it preempts or
reaches the time limit."""

TO_BE_GONE_ON_WITH = os.EX_TEMPFAIL
"""The exit status of a run that stopped without a signal before its end, and can go on."""

SLURM_KILLS_WITHIN_S = 30.0
"""How long a job that SLURM ends waits at most for the kill that follows SIGTERM, where SLURM does
not say (KillWait, GraceTime): its default."""

SLURM_IS_LATE_BY_S = 10.0
"""By how much the kill may come later than that."""

SLURM_ANSWERS_WITHIN_S = 10.0

SLURM_ASKED_EVERY_S = 10.0

SLURM_ENDS = re.compile(
    r"\bJobState=(PREEMPTED|REQUEUE\w*|CANCELLED|COMPLETING)\b|\bPreemptTime=\d"
)
"""What `scontrol show job` says of a job that is to be killed: one that is preempted runs on in its
time of grace, and has the time of its preemption."""


class Interrupted(SystemExit):
    """The run stopped before its end, and can go on.

    Args:
        reason: why.
        code: the exit status of the process.
    """

    def __init__(self, reason: str, code: int = TO_BE_GONE_ON_WITH) -> None:
        super().__init__(code)
        self._reason = reason

    @classmethod
    def by(cls, signum: int) -> "Interrupted":
        """By a signal, with the exit status that shells expect."""
        return cls(f"stopped by {signal.Signals(signum).name}", 128 + signum)

    def __str__(self) -> str:
        return self._reason


class SignalsHandled:
    """Handles signals while the `with` block runs, and restores what handled them before; one that
    was ignored (`nohup`) stays so."""

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
        """Handles the signals here, also those that someone else has taken over since."""
        for signum in self._before:
            signal.signal(signum, self._note)

    def _signums(self) -> Iterable[int]:
        """Those to handle."""
        raise NotImplementedError

    def _note(self, signum: int, frame: FrameType | None) -> None:
        raise NotImplementedError


class StopSignals(SignalsHandled):
    """Notes signals that ask to stop while the `with` block runs, and restores what handled them.

    Until `defer` such a signal raises `Interrupted` where the program stands; from then on the
    program asks for `received` when it can stop. A second Ctrl-C ends at once, as
    KeyboardInterrupt. Outside the main thread, where
    Python lets nobody handle signals, nothing is installed.
    """

    def __init__(self) -> None:
        super().__init__()
        self._deferred = False
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
        """From now on signals are only noted; also those that someone else has taken over since."""
        self._deferred = True
        self.install()

    def stop(self) -> NoReturn:
        """Ends training: raises `Interrupted`, also where another process got the signal."""
        raise Interrupted.by(self._received[0] if self._received else signal.SIGTERM)

    def hand_on(self) -> None:
        """Lets what handled the noted signals before have them, now that all is saved.

        submitit's handler counts the timeout, gives the job back to SLURM, and exits. What it calls
        for that may be killed with all of the job before it can say that SLURM has heard it. SLURM
        itself requeues a preempted job only if it is still there when its time of grace ends: after
        SIGTERM a job waits to be killed, as long as SLURM says that it will be.
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
                    log.warning("%s, as all of a job is that SLURM requeues", str(error))
        job = os.environ.get("SLURM_JOB_ID")
        if job and (is_ended or signal.SIGTERM in self._received):
            _wait_for_kill(job)

    def _signums(self) -> Iterable[int]:
        return STOPPING if threading.current_thread() is threading.main_thread() else ()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self._received:
            raise KeyboardInterrupt
        if signum not in self._received:
            self._received.append(signum)
        if not self._deferred:
            raise Interrupted.by(signum)
        more = "; once more ends at once" if signum == signal.SIGINT else ""
        text = f"\n{signal.Signals(signum).name}: stopping at the end of this step{more}\n"
        os.write(2, text.encode())  # a stream may be in the middle of a write of its own


def _wait_for_kill(job: str) -> None:
    """Waits while SLURM says that it ends `job`; not after a SIGTERM of anyone else."""
    told = _asked("scontrol", "show", "job", job)
    if SLURM_ENDS.search(told):
        log.warning("waiting for SLURM, which requeues a preempted job once it has killed it")
        until = time.monotonic() + _kills_within_s(told) + SLURM_IS_LATE_BY_S
        while time.monotonic() < until and SLURM_ENDS.search(told):
            time.sleep(SLURM_ASKED_EVERY_S)
            told = _asked("scontrol", "show", "job", job)


def _kills_within_s(job: str) -> float:
    """From SIGTERM to SIGKILL: KillWait, of a preempted job after the GraceTime of its partition
    or QOS.

    Args:
        job: what SLURM says of it.
    """
    kill = re.search(r"\bKillWait\s*=\s*(\d+)", _asked("scontrol", "show", "config"))
    wait_s = float(kill[1]) if kill else SLURM_KILLS_WITHIN_S
    if not re.search(r"PREEMPTED|PreemptTime=\d", job):
        return wait_s
    graces = [0.0]
    if partition := re.search(r"\bPartition=(\S+)", job):
        told = _asked("scontrol", "show", "partition", partition[1])
        graces += [float(s) for s in re.findall(r"\bGraceTime=(\d+)", told)]
    if qos := re.search(r"\bQOS=(\S+)", job):
        told = _asked("sacctmgr", "-nP", "show", "qos", qos[1], "format=GraceTime")
        graces += [3600 * float(h) + 60 * float(m) + float(s) for h, m, s in _CLOCK.findall(told)]
    return wait_s + max(graces)


_CLOCK = re.compile(r"^(\d+):(\d+):(\d+)$", re.MULTILINE)


def _asked(*command: str) -> str:
    """What a command of SLURM prints; nothing where it does not answer."""
    try:
        told = subprocess.run(
            command, capture_output=True, text=True, timeout=SLURM_ANSWERS_WITHIN_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout
