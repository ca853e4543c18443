"""`nerve-run` as a user calls it, with runs on a cluster or on this machine."""

from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pandas as pd
from processes import ended, lean_path, nerve_run
from support import TINY_RUN

import nerve
from nerve.storage.find import find_runs
from nerve.storage.record import RunRecord

from .cluster import Cluster

SITE = Path(__file__).parent / "site"
STEPS = 60
TINY = (
    *TINY_RUN,
    *("model.seq_len=32", f"trainer.max_steps={STEPS}", "monitor.every_n_steps=20"),
    *("checkpoint.every_n_steps=20", "logger=none"),
)
"""A run of about a second, if nothing holds it."""


@dataclass(frozen=True)
class Start:
    """One start of training: its first step, its job and its process."""

    step: int
    job: str
    pid: int


class Sweep:
    """`nerve-run` in a separate folder; brake.py holds its runs until `release`."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self._output = folder / "output.txt"
        self._braking = folder / "brake"
        self._braking.mkdir(parents=True)
        self._command: BaseProcess | None = None

    @property
    def output(self) -> str:
        """The output of the last command."""
        return self._output.read_text()

    @property
    def everything(self) -> str:
        """The output of the command and of all jobs."""
        return "\n".join([self.output, *self.logs()])

    def brake(self, unlucky: int | None = None) -> str:
        """The override that holds the runs; that of the seed `unlucky` raises an error."""
        unlucky_seed = "null" if unlucky is None else unlucky
        return (
            f"+callbacks.brake={{_target_:brake.Brake,folder:{self._braking},"
            f"seed:${{seed}},unlucky:{unlucky_seed}}}"
        )

    def send(self, *overrides: str, where: str = "site") -> None:
        """Starts the command; `where` is the launcher."""
        launcher = [f"hydra/launcher={where}"] if where else []
        self._output.write_text("")
        self._command = nerve_run(
            ["-m", f"--config-dir={SITE}", *launcher, *TINY, *overrides],
            cwd=self.folder,
            log=self._output,
            environment={**self.cluster.environment, "PYTHONPATH": lean_path(SITE)},
            within_s=600,
        )

    def finish(self) -> int:
        """Waits for the command to end, and returns its exit status."""
        assert self._command is not None
        return ended(self._command)

    def abandon(self) -> None:
        """Ends the command if it is still running; its jobs continue."""
        if self._command is not None:
            self._command.kill()
            self._command.join()

    def hold(self) -> None:
        """Holds the runs that start from now on, after a `release`."""
        (self._braking / "release").unlink()

    def release(self) -> None:
        """Lets the runs continue at full speed."""
        (self._braking / "release").touch()

    def starts(self, seed: int) -> list[Start]:
        """The starts of one run, in order."""
        file = self._braking / str(seed)
        lines = file.read_text().splitlines() if file.exists() else []
        return [Start(int(step), job, int(pid)) for step, job, pid in map(str.split, lines)]

    def wait_for_start(self, seed: int, number: int = 1) -> Start:
        """The start with this number, as soon as the run is held."""

        def found() -> list[Start]:
            assert self._command is not None
            assert self._command.exitcode is None, self.everything
            return self.starts(seed)[number - 1 : number]

        return self.cluster.wait(f"start {number} of seed {seed}", found)[0]

    def records(self) -> dict[int, RunRecord]:
        """The record of each seed's run."""
        records = map(RunRecord.load, find_runs(self.folder / "outputs"))
        return {record.seed: record for record in records if record.seed is not None}

    def logs(self) -> list[str]:
        """The output of each job."""
        return [path.read_text() for path in self.folder.glob("outputs/multirun/.submitit/*/*.out")]

    def rows(self, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Metrics and spectra of one run, without the run id."""
        directory = self.records()[seed].directory
        metrics, spectra = nerve.load_metrics(directory), nerve.load_spectra(directory)
        names = ["run_id", "run_status"]
        return metrics.drop(columns=names), spectra.drop(columns=names)
