"""`nerve-run`: composes a configuration and runs it."""

if __name__ == "__main__":  # python -m, as the command: Ctrl-C may come during the imports below
    from nerve.cli import entry

    entry.run()
    raise SystemExit

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nerve.cli.config.compose import CONF, register
from nerve.cli.config.explain import explain_error, no_such_sweep
from nerve.cli.config.overrides import (
    check_added,
    has_own_files,
    overrides_of,
    refuse_lists,
    require_directories,
    value_of,
    with_literal_paths,
)
from nerve.cli.config.resume import prepare_resume
from nerve.cli.console import fail
from nerve.cli.sweep.check import CheckInPlaceOfRun, check_composed
from nerve.cli.sweep.sweeper import NAME, TrialSweeper
from nerve.cli.sweep.table import SweepError
from nerve.cli.sweep.worker import run_trial
from nerve.config import LONGEST_NAME, require
from nerve.cores import spin_briefly, uncollected
from nerve.errors import NerveError, with_notes

HINTS = {
    "hydra/launcher/joblib": "To run trials in parallel, use hydra.sweeper.n_jobs=2 instead.",
    "hydra/sweeper/cells": "It is now called hydra/sweeper=trials.",
    "hydra/launcher/submitit_slurm": 'It comes with an extra: pip install -e ".[slurm]"',
}
"""Configurations that are not available, and what to do instead."""


def main() -> None:
    """Entry point of `nerve-run`. Errors that the user can fix are shown as one message.

    Set HYDRA_FULL_ERROR=1 to see tracebacks instead.
    """
    spin_briefly()
    register({NAME: TrialSweeper})
    command = _Command(show_tracebacks=os.environ.get("HYDRA_FULL_ERROR") == "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves errors to us

    def job(config: DictConfig) -> float | None:
        return command.run(config, HydraConfig.get())

    try:
        sys.argv = [sys.argv[0], *with_literal_paths(sys.argv[1:])]
        overrides = overrides_of(sys.argv[1:])
        check_added(overrides, sys.argv[1:])
        require_directories(overrides)
        refuse_lists(overrides)
        config_name = "config"
        if (directory := value_of(overrides, "resume")) is not None:
            config_name = prepare_resume(Path(str(directory)), overrides, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except Exception as error:
        message = command.message(error)
        if message is None:
            raise
        fail("nerve-run", message, error.exit_status if isinstance(error, SweepError) else 1)
    if command.failures:
        fail("nerve-run", "\nnerve-run: ".join(map(with_notes, command.failures)))


class _Command:
    """One invocation of the command: the jobs that Hydra runs for it, and how their errors are
    reported."""

    def __init__(self, show_tracebacks: bool) -> None:
        self.failures: list[NerveError] = []
        """The errors of jobs, except those that a sweep runs in their own processes."""
        self._show_tracebacks = show_tracebacks
        self._started = False

    def run(self, config: DictConfig, hydra_config: HydraConf) -> float | None:
        """A single run, or a trial that a launcher runs in this process."""
        self._started = True
        is_trial = hydra_config.mode == RunMode.MULTIRUN
        try:
            check_composed(hydra_config)
            require(
                not (is_trial and config.get("check")),  # which `TrialSweeper` handles
                f"check=true needs hydra/sweeper=trials; {hydra_config.sweeper._target_} would "
                "train. Leave one of them out.",
            )
            with uncollected():  # torch and Lightning take seconds to import
                from nerve.cli.experiment.run import run_experiment

            return (run_trial if is_trial else run_experiment)(config, hydra_config)
        except NerveError as error:
            if self._show_tracebacks:
                raise
            if is_trial and hydra_config.sweeper._target_ != NAME:
                raise  # another sweeper would only report that the trial returned nothing
            directory = Path(hydra_config.runtime.output_dir)
            _remove_if_empty([directory] if is_trial else CheckInPlaceOfRun.missing)
            self.failures.append(error)
            if is_trial:  # a job of a cluster, in whose log this belongs
                print(f"nerve-run: {with_notes(error)}", file=sys.stderr, flush=True)
            return None

    def message(self, error: Exception) -> str | None:
        """The message to show instead of an error's traceback; None to show the traceback."""
        if isinstance(error, SweepError):
            return str(error)
        if isinstance(error, HydraException | OmegaConfBaseException):
            return _explained(error)
        if self._show_tracebacks:
            return None
        if isinstance(error, NerveError):
            return with_notes(error)
        if self._started or isinstance(error, BrokenPipeError):
            return None
        if isinstance(error, YAMLError | UnicodeDecodeError):
            reason = " ".join(str(error).split())
            return f"A configuration file must be YAML in UTF-8; one of yours is not: {reason}."
        if isinstance(error, ValueError | RuntimeError) and _is_raised_by_hydra(error):
            return str(error)  # such as options that cannot be combined, or hydra.launcher=null
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = Path(str(error.filename)).name
            return f"A file name has at most {LONGEST_NAME} bytes; {name[:20]}… has more."
        if isinstance(error, OSError):
            return _unwritable(error)
        return None


def _remove_if_empty(folders: Iterable[Path]) -> None:
    """Removes directories that Hydra created for a run that never began."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _is_raised_by_hydra(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("hydra.")


def _unwritable(error: OSError) -> str:
    try:
        place = Path.cwd()
    except OSError:
        return "A command needs a working directory; this one was deleted. Change to another one."
    return (
        f"The output directory must be writable; {error.filename}: {error.strerror}. Choose "
        f"another with hydra.run.dir=… (now in {place})."
    )


def _explained(error: Exception) -> str:
    """The message for a command line that could not be composed."""
    missing = re.match(r"Cannot find primary config '([^']*)'", str(error))
    if missing and not has_own_files(sys.argv[1:]):
        return no_such_sweep(missing[1])
    hint = HINTS.get(getattr(error, "missing_cfg_file", None) or "")
    return f"{explain_error(error)}\n{hint}" if hint else explain_error(error)
