"""A sweep: composes every trial of a grid, runs what is left to do, and accounts for all of
them."""

import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from nerve.cli.config.compose import SUBMITIT_SLURM, depends_on_place, resolved
from nerve.cli.config.hydra_internals import ConfigLoaderImpl, error_of
from nerve.cli.config.overrides import refuse_lists, refuse_merged
from nerve.cli.console import say
from nerve.cli.sweep.check import check_swept, preview
from nerve.cli.sweep.grid import Trial, combinations, compose_grid, plan_trials
from nerve.cli.sweep.local import LOG_NAME, run_here
from nerve.cli.sweep.slurm import SubmittedJobs
from nerve.cli.sweep.table import SweepTable, n_starts
from nerve.config import pasted, quoted, require, require_count, require_group, require_type
from nerve.cores import allowed
from nerve.errors import ConfigError, NerveError, StoreError
from nerve.files import as_store_error
from nerve.storage.state import FRESH, RunState

NAME = "hydra_plugins.nerve.TrialSweeper"
"""The sweeper's name in `_target_`: Hydra only creates plugins with such names."""

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"


class TrialSweeper(Sweeper):
    """Hydra's sweeper for grids, which runs only what has not been run.

    Each trial is composed first, so that its directory is known, and the content of that directory
    decides: runs that are done, active or the same as another trial are left out, interrupted ones
    are resumed, failed ones are left alone unless `retry` is set. Trials that an earlier command
    has submitted to a cluster and whose jobs are queued or running are waited for. How the trials
    ended is read from their directories.

    On this machine each trial runs in its own process. Hydra's launcher `basic` means this; any
    other launcher gets the trials that are left to do and not yet submitted.

    Args:
        n_jobs: how many trials run side by side on this machine; -1 for as many as it has cores.
        max_batch_size: how many trials another launcher gets at once; None for all.
        params: axis to values, as on the command line, which takes precedence.
        timeout_min: how many minutes a trial on this machine may take; None for no limit.

    Raises:
        ConfigError: for a value of the wrong type or out of range.
    """

    def __init__(
        self,
        n_jobs: int = 1,
        max_batch_size: int | None = None,
        params: Mapping[str, str] | None = None,
        timeout_min: float | None = None,
    ) -> None:
        require_type("hydra.sweeper.n_jobs", n_jobs, int)
        require(
            n_jobs >= 1 or n_jobs == -1,
            f"hydra.sweeper.n_jobs must be at least 1, or -1 for every core; got {n_jobs!r}.",
        )
        require_count("hydra.sweeper.max_batch_size", max_batch_size, or_null=True)
        require_type("hydra.sweeper.timeout_min", timeout_min, float, NoneType)
        require(
            timeout_min is None or timeout_min > 0,
            f"hydra.sweeper.timeout_min must be null or a positive number; got {timeout_min!r}.",
        )
        if params is not None:
            require_group("hydra.sweeper.params", params)
        self._n_jobs = allowed() if n_jobs == -1 else n_jobs
        self._max_batch_size = max_batch_size
        self._params = dict(params or {})
        self._timeout_s = None if timeout_min is None else 60 * timeout_min

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.config = config
        self.hydra_context = hydra_context
        if OmegaConf.select(config, "hydra.launcher._target_") == SUBMITIT_SLURM:
            from nerve.cli.sweep.devices import check_counted

            trainer = OmegaConf.select(config, "trainer")
            require_group("trainer", trainer, ("devices",))
            check_counted(trainer)  # its launcher can only be built from a number
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs what is left to do of the grid; with `check`, shows it instead.

        Raises:
            SweepError: after the summary, if some trials are not done.
            ConfigError: for what a sweep cannot do, and for a trial that cannot be composed;
                nothing is started then.
            NerveError: if SLURM does not report the state of jobs submitted earlier;
                nothing is started then.
        """
        assert self.config is not None
        assert self.hydra_context is not None
        if self.config.resume is not None:
            raise ConfigError(
                "A sweep resumes its interrupted runs by itself; got "
                f"{pasted('resume', self.config.resume)}. Leave resume out, or resume that single "
                "run without --multirun."
            )
        require_type("check", self.config.check, bool)
        check_swept(self.config.hydra)
        grid = self._grid(arguments)
        launcher = resolved(self.config.hydra.launcher)
        self._check_launcher(launcher)
        folder = Path(str(self.config.hydra.sweep.dir))
        jobs = None if launcher["_target_"] == BASIC else SubmittedJobs(launcher, folder)
        if jobs is not None:
            jobs.settle()
        loader = self.hydra_context.config_loader
        assert isinstance(loader, ConfigLoaderImpl)
        trials = compose_grid(loader, self.config, grid)
        plan_trials(trials)
        for trial in trials:
            _refuse_devices(trial, launcher)
        if jobs is not None:
            _find_jobs(trials, jobs)
        if self.config.check:
            preview(folder, trials)
            return
        if any(trial.rejected_because is None for trial in trials):
            _make(folder, self.config)
        table = SweepTable(folder, trials)
        table.begin()
        to_do = [trial for trial in trials if trial.is_to_do]
        if jobs is None:
            if min(self._n_jobs, len(to_do)) > 1:
                say(
                    f"progress: nerve-status {shlex.quote(str(folder))}; each trial writes "
                    f"{LOG_NAME} in its directory"
                )
            signum = run_here(to_do, self._n_jobs, self._timeout_s, table.starting, table.ended)
            table.end(signum)
        else:
            submitted = [trial for trial in trials if trial.job is not None]
            table.end(*self._hand_over(to_do, submitted, jobs))

    def _grid(self, arguments: Sequence[str]) -> Sequence[Sequence[str]]:
        """The overrides of each trial."""
        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        parser = OverridesParser.create(config_loader=loader)
        given = [f"{key}={values}" for key, values in self._params.items()]
        overrides = parser.parse_overrides([*given, *arguments])
        refuse_lists(overrides)
        fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
        refuse_merged(loader, self.config.hydra, fixed)
        return combinations(overrides)

    def _check_launcher(self, launcher: Mapping[str, Any]) -> None:
        """Refuses a launcher that conflicts with `n_jobs`, and values that it would ignore."""
        require(
            launcher["_target_"] != JOBLIB,
            "Trials run in parallel with hydra.sweeper.n_jobs; got hydra/launcher=joblib. Use "
            f"hydra.sweeper.n_jobs={launcher.get('n_jobs', 2)} instead.",
        )
        require(
            launcher["_target_"] == BASIC or self._n_jobs == 1,
            f"hydra.sweeper.n_jobs counts trials on this machine; got {self._n_jobs} with "
            "another launcher. Leave it out; for a SLURM array, set "
            "hydra.launcher.array_parallelism.",
        )
        require(
            launcher["_target_"] == BASIC or self._timeout_s is None,
            "hydra.sweeper.timeout_min limits trials on this machine; got "
            f"{(self._timeout_s or 0) / 60:g} with another launcher. Leave it out; for a SLURM "
            "array, set hydra.launcher.timeout_min.",
        )
        require(
            launcher["_target_"] != BASIC or self._max_batch_size is None,
            "hydra.sweeper.max_batch_size counts the trials that another launcher gets at once; "
            f"got {self._max_batch_size} on this machine. Leave it out; hydra.sweeper.n_jobs is "
            "how many run in parallel.",
        )

    def _hand_over(
        self, trials: Sequence[Trial], submitted: Sequence[Trial], jobs: SubmittedJobs
    ) -> tuple[int | None, list[Exception]]:
        """Passes trials to the launcher, and records how they and those submitted earlier ended.

        Returns a signal that asked to stop, and the errors of the launcher.
        """
        before = {trial.number: n_starts(trial) for trial in (*trials, *submitted)}
        errors: list[Exception] = []
        signum: int | None = None
        try:
            self._launch(trials, jobs, errors)
            jobs.wait({_place(trial) for trial in submitted})
            _wait_for_silence([*trials, *submitted])
        except KeyboardInterrupt:
            errors.append(NerveError("no longer waiting; submitted jobs continue"))
            signum = signal.SIGINT
        for trial in (*trials, *submitted):
            _refuse_other_values(trial)
            if signum is None and n_starts(trial) == before[trial.number]:
                trial.start_error = jobs.ended(_place(trial))
        return signum, errors

    def _launch(
        self, trials: Sequence[Trial], jobs: SubmittedJobs, errors: list[Exception]
    ) -> None:
        """Lets the launcher run the trials, and adds its errors to `errors`."""
        assert self.launcher is not None
        size = self._max_batch_size or max(1, len(trials))
        for number in range(0, len(trials), size):
            batch = trials[number : number + size]
            overrides = [[*trial.overrides, _place(trial)] for trial in batch]
            try:
                returns = self.launcher.launch(overrides, initial_job_idx=number)
                errors += [error for job in returns if (error := error_of(job)) is not None]
            except Exception as error:  # submitit's, when a job is killed
                errors.append(error)
                jobs.wait({_place(trial) for trial in batch})


def _make(folder: Path, config: DictConfig) -> None:
    with as_store_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")


def _refuse_devices(trial: Trial, launcher: Mapping[str, Any]) -> None:
    if trial.is_to_do:
        from nerve.cli.sweep.devices import check_devices  # torch takes seconds to import

        try:
            check_devices(trial.config.trainer, launcher)
        except ConfigError as error:
            trial.rejected_because = str(error)


def _find_jobs(trials: Sequence[Trial], jobs: SubmittedJobs) -> None:
    """Finds the jobs that an earlier command has submitted for trials and that will still run
    them."""
    ended = (RunState.DONE, RunState.FAILED)
    waiting = [
        trial
        for trial in trials
        if trial.duplicate_of is None
        and trial.rejected_because is None
        and trial.state_before not in ended
    ]
    open_jobs = jobs.open() if waiting else {}
    for trial in waiting:
        trial.job = open_jobs.get(_place(trial))


def _wait_for_silence(trials: Sequence[Trial]) -> None:
    """Waits up to a minute, because a run whose node was lost looks alive as long as its last
    heartbeat is recent."""
    until = time.monotonic() + FRESH.total_seconds()
    while time.monotonic() < until and any(map(_is_alive, trials)):
        time.sleep(1.0)


def _is_alive(trial: Trial) -> bool:
    try:
        return trial.run.reload().state == RunState.ALIVE
    except StoreError:
        return False


def _refuse_other_values(trial: Trial) -> None:
    """Checks that no job of another trial came first, if directories are chosen by hand."""
    if depends_on_place(trial.config):
        return
    try:
        trial.run.reload().require_same(trial.values())
    except StoreError as error:
        trial.rejected_because = str(error)


def _place(trial: Trial) -> str:
    """The override that names the trial's directory, since another machine may derive a different
    one."""
    return f"hydra.sweep.subdir={quoted(trial.config.hydra.sweep.subdir)}"
