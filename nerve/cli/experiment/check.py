"""`check=true`: shows what a command would run, and runs nothing."""

import sys
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from nerve.cli.sweep.grid import Cell
from nerve.cli.sweep.preview import preview
from nerve.config import require
from nerve.errors import NerveError
from nerve.storage.directory import RunDirectory


class CheckInPlaceOfRun(Callback):
    """Hydra's callback that ends a single run with `check=true` before it has a directory. That of
    a sweep is `TrialSweeper`'s."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.check is not True:
            return
        HydraConfig.instance().set_config(config)
        try:
            check_launcher(config.hydra)
            check_experiment(config)
        except NerveError as error:
            print(f"nerve-run: {error}", file=sys.stderr)
            sys.exit(1)
        sys.exit(0)


def check_launcher(hydra_config: HydraConf) -> None:
    """Refuses a launcher for a single run, which would be passed over."""
    launcher = hydra_config.runtime.choices.get("hydra/launcher", "basic")
    require(
        hydra_config.mode == RunMode.MULTIRUN or launcher == "basic",
        f"A launcher runs the trials of a sweep; hydra/launcher={launcher} would be passed over "
        "and the run be made here. Add -m.",
    )


def check_experiment(config: DictConfig) -> None:
    """Shows what `run_experiment` would do, and does nothing.

    Args:
        config: composed, with Hydra's own node.

    Raises:
        NerveError: as there, where it can be told before.
    """
    from nerve.cli.experiment.machine import check_machine  # torch takes seconds to import
    from nerve.cli.experiment.plan import Plan

    run = RunDirectory(_directory(config))
    trial = Cell(0, list(config.hydra.overrides.task), config, run)
    trial.plan = Plan.of(trial.run_config())
    run.require_same(trial.plan.values)
    trial.found = run.state
    if trial.is_to_do:
        check_machine(trial.plan)
    preview(run.path, [trial])


def _directory(config: DictConfig) -> Path:
    """Where the run would be; "a new directory" where it would be named for the time."""
    named = any(each.startswith("hydra.run.dir=") for each in config.hydra.overrides.hydra)
    if named or config.resume is not None:
        return Path(str(config.hydra.run.dir))
    return Path("a new directory")
