"""`nerve-run`: composes a configuration and runs it."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nerve.cli.config.compose import CONF, register
from nerve.cli.config.options import refuse_lists, refuse_merged
from nerve.cli.config.overrides import check_added, has_own_files, no_such_sweep, overrides_of, told
from nerve.cli.config.paths import with_literal_paths
from nerve.cli.config.resume import prepare_resume
from nerve.cli.sweep.sweeper import register_sweeper
from nerve.cli.sweep.table import SweepError
from nerve.cli.sweep.worker import run_cell
from nerve.config import require
from nerve.errors import NerveError
from nerve.storage.directory import RunDirectory

HINTS = {
    "hydra/launcher/joblib": "Trials run side by side with hydra.sweeper.n_jobs=2 in its place.",
    "hydra/launcher/submitit_slurm": 'It comes with an extra: pip install -e ".[slurm]"',
}
"""Configurations that are not there, and what to do."""


def main() -> None:
    """Entry point of `nerve-run`. Errors that the user can fix are shown as one message.

    Set HYDRA_FULL_ERROR=1 to see tracebacks instead.
    """
    register()
    register_sweeper()
    show_tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves errors to us
    started = False
    failures: list[NerveError] = []
    asks_to_check = False

    def job(config: DictConfig) -> float | None:
        nonlocal started
        started = True
        hydra_config = HydraConfig.get()
        is_cell = hydra_config.mode == RunMode.MULTIRUN
        try:
            _check_launcher(hydra_config, is_cell)
            if not is_cell:
                refuse_merged(
                    GlobalHydra.instance().config_loader(),
                    hydra_config.job.config_name,
                    hydra_config.overrides.task,
                )
            if asks_to_check:
                _check(config, hydra_config)
                return None
            # torch and Lightning take seconds to import
            from nerve.cli.experiment.run import run_experiment

            return (run_cell if is_cell else run_experiment)(config, hydra_config)
        except NerveError as error:
            if show_tracebacks:
                raise
            _remove_if_empty(Path(hydra_config.runtime.output_dir))
            failures.append(error)
            if is_cell:  # a job of a cluster, in whose log this belongs
                print(f"nerve-run: {error}", file=sys.stderr, flush=True)
            return None

    try:
        sys.argv = [sys.argv[0], *with_literal_paths(sys.argv[1:])]
        check_added(sys.argv[1:])
        refuse_lists(overrides_of(sys.argv[1:]))
        config_name = prepare_resume(sys.argv[1:]) or "config"
        asks_to_check = _given("check") is True
        if asks_to_check:  # Hydra makes the directory of a run before it calls the job
            sys.argv = [*sys.argv, "hydra.run.dir=."]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except SweepError as error:
        _fail(str(error), error.exit_status)
    except NerveError as error:
        if show_tracebacks:
            raise
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _fail(_told(error))
    except ValueError as error:  # so Hydra refuses options that exclude each other
        if started or show_tracebacks or not str(error).startswith("Only one of --"):
            raise
        _fail(str(error))
    except OSError as error:
        if started or show_tracebacks:
            raise
        _fail(
            f"The output directory must be writable; {error.filename}: {error.strerror}. "
            f"Choose another with hydra.run.dir=… (now in {Path.cwd()})."
        )
    if failures:
        _fail("\nnerve-run: ".join(str(failure) for failure in failures))


def _check(config: DictConfig, hydra_config: HydraConf) -> None:
    from nerve.cli.experiment.run import check_experiment  # torch takes seconds to import

    check_experiment(config, RunDirectory(_directory_to_check()), hydra_config.overrides.task)


def _given(key: str) -> Any:
    """The value that the command line gives a key; None for one that it does not give."""
    values = [each.value() for each in overrides_of(sys.argv[1:]) if each.key_or_group == key]
    return values[-1] if values else None


def _directory_to_check() -> Path:
    """Where the run would be; "a new directory" where it would be named for the time."""
    named = [
        each.value()
        for each in overrides_of(sys.argv[1:])
        if each.key_or_group in ("hydra.run.dir", "resume")
    ][:-1]
    return Path(str(named[-1])) if named else Path("a new directory")


def _check_launcher(hydra_config: HydraConf, is_cell: bool) -> None:
    launcher = hydra_config.runtime.choices.get("hydra/launcher", "basic")
    require(
        is_cell or launcher == "basic",
        f"A launcher runs the cells of a sweep; hydra/launcher={launcher} would be passed over and "
        "the run be made here. Add -m.",
    )


def _remove_if_empty(directory: Path) -> None:
    """Removes the directory that Hydra made for a run that never began; one that the user named
    may be his own."""
    if not any(argument.startswith("hydra.run.dir=") for argument in sys.argv):
        with suppress(OSError):
            directory.rmdir()


def _told(error: Exception) -> str:
    """The message for what could not be composed."""
    missing = re.match(r"Cannot find primary config '([^']+)'", str(error))
    if missing and not has_own_files(sys.argv[1:]):
        return no_such_sweep(missing[1])
    hint = HINTS.get(getattr(error, "missing_cfg_file", None) or "")
    return f"{told(error)}\n{hint}" if hint else told(error)


def _fail(message: str, exit_status: int = 1) -> NoReturn:
    print(f"nerve-run: {message}", file=sys.stderr)
    sys.exit(exit_status)


if __name__ == "__main__":
    main()
