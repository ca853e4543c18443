"""The trials of a sweep: each composed, with its directory and what that already holds."""

import itertools
import math
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nerve.cli.config.compose import identity, resolved
from nerve.cli.config.explain import explain_error, explain_unresolved
from nerve.cli.config.hydra_internals import (
    ConfigLoaderImpl,
    apply_overrides,
    overrides_dirname,
    repository_of,
)
from nerve.cli.sweep.stored import StoredRuns
from nerve.config import require
from nerve.errors import ConfigError, NerveError, StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.identity import differences
from nerve.storage.state import RunState

if TYPE_CHECKING:
    from nerve.cli.experiment.plan import Plan


@dataclass
class Trial:
    """One point of a grid.

    Attributes:
        number: its place in the grid, from 0.
        overrides: the overrides that are its own, and those that all trials share.
        config: composed, with Hydra's own node.
        run: its directory, or the sweep's if unknown. Duplicates share one.
        state_before: what the directory held before the sweep.
        job: a queued or running job that an earlier command has submitted for it.
        duplicate_of: the number of an earlier trial that defines the same result.
        rejected_because: why it cannot be run.
        start_error: why it could not be started, or its end could not be recorded.
        plan: of its run, once `plan_trials` has made it.
    """

    number: int
    overrides: Sequence[str]
    config: DictConfig
    run: RunDirectory
    state_before: RunState = RunState.NEW
    job: str | None = None
    duplicate_of: int | None = None
    rejected_because: str | None = None
    start_error: str | None = None
    plan: "Plan | None" = None

    @property
    def directory(self) -> Path:
        """The directory of its run."""
        return self.run.path

    @property
    def is_to_do(self) -> bool:
        """Whether the sweep is to run it."""
        if (
            self.duplicate_of is not None
            or self.rejected_because is not None
            or self.job is not None
        ):
            return False
        if self.state_before == RunState.FAILED:
            return bool(self.config.retry)
        return self.state_before not in (RunState.DONE, RunState.ALIVE)

    def run_config(self) -> DictConfig:
        """The configuration without Hydra's own node, to which its interpolations refer."""
        HydraConfig.instance().set_config(self.config)
        keys = [str(key) for key in self.config if key != "hydra"]
        return OmegaConf.masked_copy(self.config, keys)

    def values(self) -> dict[str, Any]:
        """The configuration without Hydra's own node, resolved."""
        return resolved(self.run_config())


MOST_TRIALS = 100_000
"""Composing that many trials takes minutes; more are hardly intended."""


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each trial: all combinations of the values of the axes, the last axis
    changing fastest. Of overrides with the same key, the last one counts.

    Raises:
        ConfigError: for an axis that has no values or does not list them, and for too many trials.
    """
    axes: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
            continue
        require(
            not override.is_interval_sweep(),
            f"An axis of a sweep has a list of values; {override.input_line} is an interval. List "
            f"them, as in {key}=0.1,0.2,0.3.",
        )
        values = itertools.islice(override.sweep_string_iterator(), MOST_TRIALS + 1)
        axes[key] = [f"{key}={value}" for value in values]
        require(
            bool(axes[key]),
            f"An axis of a sweep has at least one value; {override.input_line} has none. Add "
            "values, or leave it out.",
        )
    require(
        math.prod(map(len, axes.values())) <= MOST_TRIALS,
        f"A sweep has at most {MOST_TRIALS:,} trials; these axes have more combinations: "
        f"{' '.join(str(o.input_line) for o in overrides if o.is_sweep_override())}. Leave out "
        "values.",
    )
    return list(map(list, itertools.product(*axes.values())))


def compose_grid(
    loader: ConfigLoaderImpl, config: DictConfig, grid: Sequence[Sequence[str]]
) -> list[Trial]:
    """The trials of a grid, in its order.

    Args:
        loader: Hydra's.
        config: the sweep's own configuration.
        grid: the overrides of each trial.

    Raises:
        ConfigError: for overrides that cannot be composed, such as a misspelled option, and for
            trials of different results that would share a directory.
    """
    trials: list[Trial] = []
    first: dict[Path, tuple[Trial, dict[str, Any]]] = {}
    stored, composer = StoredRuns(), Composer(loader, config)
    for number, overrides in enumerate(grid):
        try:
            composed = composer.compose(overrides)
        except HydraException as error:
            raise ConfigError(
                f"trial {number} ({' '.join(overrides)}) of {len(grid)} cannot be composed; "
                f"nothing was started. {explain_error(error)}"
            ) from error
        with open_dict(composed.hydra):
            composed.hydra.job.id = composed.hydra.job.num = number
        trial = Trial(number, overrides, composed, stored.at(Path(str(composed.hydra.sweep.dir))))
        try:
            _place(trial, stored)
            values = trial.values()
            other, its_values = first.setdefault(trial.directory, (trial, values))
            if other is not trial:
                _check_same(trial, other, differences(values, its_values))
                trial.duplicate_of = other.number
            trial.state_before = trial.run.state
            trial.run.require_same(values)
        except OmegaConfBaseException as error:
            trial.rejected_because = explain_unresolved(error, composed.hydra.runtime.choices)
        except StoreError as error:
            trial.rejected_because = str(error)
        trials.append(trial)
    return trials


def plan_trials(trials: Sequence[Trial]) -> None:
    """Plans each trial that is to be run; if planning fails, the trial is refused."""
    for trial in trials:
        if not trial.is_to_do:
            continue
        from nerve.cli.experiment.plan import Plan  # torch takes seconds to import

        try:
            trial.plan = Plan.of(trial.run_config())
        except NerveError as error:
            trial.rejected_because = str(error)


class Composer:
    """Composes trials as Hydra's loader does, but only once for all trials with the same options.

    For each composition, Hydra reads some thirty files, selects and merges them; applying the
    values afterwards costs a tenth of that.

    Args:
        loader: Hydra's.
        config: the sweep's own configuration.
    """

    def __init__(self, loader: ConfigLoaderImpl, config: DictConfig) -> None:
        self._loader, self._config = loader, config
        self._of_options: dict[tuple[str, ...], DictConfig] = {}
        self._groups: dict[str, bool] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The result of `load_sweep_config` for the overrides of a trial. Raises as that does."""
        parsed = OverridesParser.create().parse_overrides([*overrides])
        self._loader.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
        values = [each for each in parsed if self._is_value(each)]
        options = tuple(str(each.input_line) for each in parsed if each not in values)
        if options not in self._of_options:
            chosen = self._loader.load_sweep_config(self._config, list(options))
            self._of_options[options] = chosen
        composed = deepcopy(self._of_options[options])
        apply_overrides(values, composed)
        job = composed.hydra.job
        own = [each for each in parsed if not each.is_hydra_override()]
        composed.hydra.overrides.task = [each.input_line for each in own]
        job.override_dirname = overrides_dirname(own, **job.config.override_dirname)
        return composed

    @cached_property
    def _repository(self) -> Any:
        """All options that there are, also those of `hydra.searchpath`."""
        hydra = self._config.hydra
        given: Any = OmegaConf.to_container(hydra.overrides.hydra)  # with ${…} as it is
        return repository_of(self._loader, hydra.job.config_name, given)[1]

    def _is_value(self, override: Override) -> bool:
        """Whether it sets a value of the application, after options have been merged."""
        if override.is_hydra_override():
            return False
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = bool(self._repository.get_group_options(key, None))
        return not self._groups[key] or isinstance(override.value(), dict)


def _place(trial: Trial, stored: StoredRuns) -> None:
    """Finds the trial's directory: where Hydra would put it, or where its run already is."""
    hydra = trial.config.hydra
    HydraConfig.instance().set_config(trial.config)
    subdir = str(hydra.sweep.subdir)
    trial.run = stored.at(trial.directory / subdir)
    own_id = identity(trial.config)
    if subdir == own_id:  # otherwise it was chosen by hand
        trial.run = stored.run_of(trial.run, own_id)
    OmegaConf.set_readonly(hydra, False)
    with open_dict(hydra):
        hydra.sweep.subdir = trial.directory.name if subdir == own_id else subdir
        hydra.runtime.output_dir = os.path.abspath(trial.directory)


def _check_same(trial: Trial, other: Trial, different: Sequence[str]) -> None:
    """Refuses the sweep if two different results would share a directory chosen by hand."""
    if different:
        names = [f"{each.number} ({' '.join(each.overrides)})" for each in (other, trial)]
        raise ConfigError(
            f"A directory can hold only one run; trials {' and '.join(names)} would share "
            f"{trial.directory} with different values of {', '.join(different)}; nothing was "
            "started. Put what varies into hydra.sweep.subdir, or omit that, so that each trial "
            "has its own."
        )
