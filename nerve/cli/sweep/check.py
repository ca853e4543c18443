"""`check=true`: shows what a command would run, and runs nothing."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from nerve.cli.config.overrides import refuse_merged
from nerve.cli.console import console, fail, say
from nerve.cli.directories import SingleRunDirectory
from nerve.cli.sweep.grid import Trial
from nerve.cli.sweep.table import SweepError, counted, label_before, n_trials
from nerve.config import require
from nerve.errors import NerveError

UNITS = ("B", "kB", "MB", "GB", "TB")


class CheckInPlaceOfRun(Callback):
    """Hydra's callback that ends a single run with `check=true` before it has a directory. For
    sweeps, `TrialSweeper` does that."""

    missing: ClassVar[list[Path]] = []
    """The run's directory and its parents that do not exist before Hydra creates them."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        directory = Path(str(config.hydra.run.dir))
        self.missing[:] = [each for each in (directory, *directory.parents) if not each.exists()]
        if config.check is not True:
            return
        HydraConfig.instance().set_config(config)
        try:
            check_composed(config.hydra)
            check_experiment(config)
        except NerveError as error:
            fail("nerve-run", str(error))
        sys.exit(0)


def check_composed(hydra_config: HydraConf) -> None:
    """Refuses what Hydra accepts for a single run and ignores: a launcher, values of a sweep, and
    all but the last of several options of a group."""
    if hydra_config.mode != RunMode.MULTIRUN:
        loader = GlobalHydra.instance().config_loader()
        refuse_merged(loader, hydra_config, hydra_config.overrides.task)
        given = _given(hydra_config, ("hydra.sweep", "hydra.sweeper"))
        require(
            not given,
            f"hydra.sweep and hydra.sweeper apply to a sweep; got {' '.join(given)} with a single "
            "run, which would ignore it. Add -m for a sweep; hydra.run.dir is the directory of a "
            "single run.",
        )
    launcher = hydra_config.runtime.choices.get("hydra/launcher", "basic")
    require(
        hydra_config.mode == RunMode.MULTIRUN or launcher == "basic",
        f"A launcher runs the trials of a sweep; hydra/launcher={launcher} would be ignored, and "
        "the run would start on this machine. Add -m.",
    )


def check_swept(hydra_config: HydraConf) -> None:
    """Refuses what Hydra accepts for a sweep and ignores: the directory of a single run."""
    given = _given(hydra_config, ("hydra.run",))
    require(
        not given,
        f"The trials of a sweep have their directories in hydra.sweep.dir; got {' '.join(given)}, "
        "which would be ignored. Set hydra.sweep.dir.",
    )


def _given(hydra_config: HydraConf, nodes: Sequence[str]) -> list[str]:
    """The overrides of these nodes on the command line."""
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.hydra)  # with ${…} as it is
    keys = {each: each.lstrip("+~").partition("=")[0] for each in overrides}
    return [each for each, key in keys.items() if ".".join(key.split(".")[:2]) in nodes]


def check_experiment(config: DictConfig) -> None:
    """Shows what `run_experiment` would do, without doing it.

    Args:
        config: composed, with Hydra's own node.

    Raises:
        NerveError: as `run_experiment` does, if the error shows without running.
    """
    from nerve.cli.experiment.machine import check_machine  # torch takes seconds to import
    from nerve.cli.experiment.plan import Plan
    from nerve.training.checkpoint_io import require_other_files

    run = SingleRunDirectory(_directory(config))
    trial = Trial(0, list(config.hydra.overrides.task), config, run)
    trial.plan = Plan.of(trial.run_config())
    run.require_same(trial.plan.values)
    trial.state_before = run.state
    if trial.is_to_do:
        check_machine(trial.plan)
        require_other_files(trial.plan.callbacks, run)
    preview(run.path, [trial])


def _directory(config: DictConfig) -> Path:
    """The directory of the run; "a new directory" if it would be named after the time."""
    overrides = config.hydra.overrides.hydra
    named = any(each.lstrip("+").startswith("hydra.run.dir=") for each in overrides)
    if named or config.resume is not None:
        return Path(str(config.hydra.run.dir))
    return Path("a new directory")


def preview(folder: Path, trials: Sequence[Trial]) -> None:
    """Prints the trials of a sweep, each with its state and estimated sizes; starts nothing.

    Args:
        folder: of the sweep.
        trials: all of the grid, planned if they are to be run.

    Raises:
        SweepError: if some are refused, with the reasons.
    """
    from nerve.cli.experiment.machine import COUNTED, Estimate  # torch takes seconds to import

    table = Table(title=f"what would run in {folder}", title_justify="left")
    for name in ("", "trial", "state", "parameters", "memory"):
        right = name in ("", "parameters", "memory")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    estimates = [
        Estimate.of(trial.plan) if trial.plan else Estimate(None, None) for trial in trials
    ]
    for trial, estimate in zip(trials, estimates, strict=True):
        n, memory = estimate.n_parameters, estimate.memory_bytes
        table.add_row(
            str(trial.number),
            " ".join(each for each in trial.overrides if not each.startswith("check="))
            or "no overrides",
            label_before(trial),
            "–" if n is None else f"{n:,}",
            "–" if memory is None else _size(memory),
        )
    console().print(table)
    n_to_do = sum(trial.is_to_do for trial in trials)
    say(f"{n_trials(len(trials))}: {counted(trials)}; {n_to_do} to run. Nothing was started.")
    memories = {estimate.memory_bytes for estimate in estimates}
    if memories - {None}:
        say(COUNTED)
    if None in memories:
        say("A dash: the trial will not run, the value depends on the data, or it is not known.")
    refused = [trial for trial in trials if trial.rejected_because is not None]
    if refused:
        lines = [f"{len(refused)} of {n_trials(len(trials))} in {folder} are refused."]
        lines += [f"  {trial.number}: {trial.rejected_because}" for trial in refused]
        raise SweepError("\n".join(lines), exit_status=1)


def _size(n_bytes: float) -> str:
    for unit in UNITS:
        if n_bytes < 1000 or unit == UNITS[-1]:
            break
        n_bytes /= 1000
    return f"{n_bytes:.3g} {unit}"
