"""Queries SLURM about jobs: those in the queue, how one has ended, and what each was submitted
for."""

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nerve.errors import NerveError

SUBMISSION_SUFFIX = "_nerve.json"
"""Suffix of the file next to submitit's own that says what a job was submitted for. submitit's
files are pickles: reading one from a shared folder would run whatever somebody put into it."""

COMPLETING = "CG"  # completing: its processes are being ended, or have just been

ANSWERS_WITHIN_S = 60
"""Clients of a controller that is down would wait."""

_NEVER = re.compile(
    r"held|^(DependencyNeverSatisfied|BadConstraints|InvalidAccount|InvalidQOS)$", re.I
)
"""Reasons for which a job waits until somebody intervenes."""

_HELD_STATES = ("RH", "SE")  # requeued and held, special exit


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue.

    Attributes:
        state: SLURM's short name of it, such as PD (pending) or R (running).
        reason: why it waits, in SLURM's word.
    """

    state: str
    reason: str

    @property
    def waits_for_ever(self) -> bool:
        """Whether it starts only after somebody intervenes."""
        waits = self.state == "PD" and bool(_NEVER.search(self.reason))
        return waits or self.state in _HELD_STATES


def squeue(cluster: str | None) -> list[str]:
    """The command that prints id, state and reason of each of this user's jobs that is queued or
    running, including jobs that are being requeued, suspended or held.

    Args:
        cluster: the cluster to ask, if it is not this machine's.
    """
    filters = [f"--unset={name}" for name in os.environ if name.startswith("SQUEUE_")]
    mine = ["--all", "--array", f"--user={os.getuid()}"]
    where = cluster or os.environ.get("SBATCH_CLUSTERS")
    clusters = [f"--clusters={where}"] if where else []
    # submitit calls it without a limit of its own.
    limited = ["timeout", "--kill-after=5", str(ANSWERS_WITHIN_S)]
    command = ["squeue", "--noheader", "--format=%i %t %r", *mine, *clusters]
    return [*limited, "env", *filters, *command]


def query_queue(command: list[str]) -> dict[str, QueuedJob]:
    """The jobs in the queue, by id.

    Raises:
        NerveError: if SLURM does not answer.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
    except (subprocess.CalledProcessError, OSError) as error:
        raise NerveError(
            "The jobs of a sweep are looked up with squeue, on a machine of the cluster; "
            f"{_describe_failure(error)}. Try again."
        ) from error
    return parse_queue(answer.stdout)


def parse_queue(answer: str) -> dict[str, QueuedJob]:
    """Parses the output of `squeue`."""
    lines = (line.split(maxsplit=2) for line in answer.splitlines())
    return {
        line[0]: QueuedJob(line[1], line[2] if len(line) > 2 else "")
        for line in lines
        if len(line) > 1
    }


def final_state(job_id: str) -> str | None:
    """The final state of a job, such as TIMEOUT; None once SLURM has forgotten it."""
    command = ["scontrol", "show", "job", job_id]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWERS_WITHIN_S, check=True
        )
    except (subprocess.SubprocessError, OSError):
        return None
    state = re.search(r"\bJobState=(\w+)", output.stdout)
    return state[1] if state else None


@dataclass(frozen=True)
class Submission:
    """What a job was submitted for.

    Attributes:
        folder: of the sweep, absolute.
        overrides: the overrides that it was given.
    """

    folder: str
    overrides: tuple[str, ...]


def read_submission(file: Path) -> Submission | None:
    """The content of the file next to submitit's; None if it cannot be read: a trial submitted
    twice still runs only once."""
    try:
        content = json.loads(file.read_bytes())
        return Submission(str(content["folder"]), tuple(map(str, content["overrides"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def cluster_of(launcher: Mapping[str, object]) -> str | None:
    """The cluster that `hydra.launcher` submits to, if it names one."""
    more = launcher.get("additional_parameters")
    named = more.get("clusters") if isinstance(more, Mapping) else None
    return None if named is None else str(named)


def _describe_failure(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        if error.returncode == 124:  # of timeout(1)
            return f"it did not answer within {ANSWERS_WITHIN_S} s"
        return f"it says: {error.stderr.strip() or error}"
    return f"it cannot be called: {error}"
