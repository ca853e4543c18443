"""Jobs of SLURM that submitit has sent, followed to their end also where its launcher gives up."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

_SUBMITTED = "_submitted.pkl"


class SentJobs:
    """The jobs that a launcher sends from now on.

    submitit's launcher raises at the first job that was killed, while others may still be waiting
    or at work; and it would wait for ever for a task of an array that was cancelled while it was
    queued, which it is kept from here.

    Args:
        launcher: the values of `hydra.launcher`; jobs of another launcher than submitit's for SLURM
            are not known.
    """

    def __init__(self, launcher: Mapping[str, Any]) -> None:
        self._folder: Path | None = None
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._folder = Path(launcher["submitit_folder"])
            self._n_tasks = launcher["nodes"] * launcher["tasks_per_node"]
            _look_for_cancelled_tasks()
        self._before = self._ids()

    def wait(self) -> None:
        """Returns once none of them is queued or at work."""
        sent = self._ids() - self._before
        if not sent or self._folder is None:
            return
        import submitit

        for job_id in sorted(sent):
            submitit.SlurmJob(self._folder, job_id, tasks=list(range(self._n_tasks))).wait()

    def _ids(self) -> set[str]:
        """Of all jobs that this sweep has sent so far: submitit keeps a file of each."""
        if self._folder is None:
            return set()
        pattern = f"{self._folder.name.replace('%j', '*')}/*{_SUBMITTED}"
        files = self._folder.parent.glob(pattern)
        return {path.name.removesuffix(_SUBMITTED) for path in files}


def _look_for_cancelled_tasks() -> None:
    """Makes submitit look into the queue for what the accounting no longer knows.

    Of a task of an array that is cancelled while it is queued SLURM keeps nothing: it is no longer
    among those of the array that wait. What submitit last read of it, "pending", would stay.
    """
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    class Watcher(SlurmInfoWatcher):
        def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
            info: dict[str, dict[str, str]] = super().read_info(string)
            forgotten = (self._info_dict.keys() - self._finished) - info.keys()
            for job_id in _gone(forgotten):
                info[job_id] = {"JobID": job_id, "State": "CANCELLED"}
            return info

    SlurmJob.watcher = Watcher(delay_s=SlurmJob.watcher._delay_s)


def _gone(job_ids: set[str]) -> set[str]:
    """Those that the queue does not have; none as long as it does not answer."""
    if not job_ids:
        return set()
    mine = ["--array", "--states=all", f"--user={os.getuid()}"]
    command = ["squeue", "--noheader", "--format=%i", *mine]
    queue = subprocess.run(command, capture_output=True, text=True)
    return job_ids - set(queue.stdout.split()) if queue.returncode == 0 else set()
