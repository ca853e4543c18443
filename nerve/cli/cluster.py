"""Jobs of SLURM that submitit has sent, followed to their end also where its launcher gives up."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUBMITIT_SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"

_SUBMITTED = "_submitted.pkl"


class SentJobs:
    """The jobs that a launcher sends from now on.

    submitit's launcher raises at the first job that was killed, while others may still be waiting
    or at work.

    Args:
        launcher: the values of `hydra.launcher`; jobs of another launcher than submitit's for SLURM
            are not known.
    """

    def __init__(self, launcher: Mapping[str, Any]) -> None:
        self._folder: Path | None = None
        if launcher["_target_"] == SUBMITIT_SLURM:
            self._folder = Path(launcher["submitit_folder"])
            self._n_tasks = launcher["nodes"] * launcher["tasks_per_node"]
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
