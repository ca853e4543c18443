"""`nerve-run`: composes a configuration and runs it."""

import os
import sys
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from nerve.cli.compose import CONF, register
from nerve.errors import NerveError


def main() -> None:
    """Entry point of `nerve-run`. Errors that the user can mend are shown as one message.

    Set HYDRA_FULL_ERROR=1 to see tracebacks instead.
    """
    register()
    show_tracebacks = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves errors to us
    started = False
    failures: list[NerveError] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> float | None:
        nonlocal started
        started = True
        from nerve.cli.experiment import (
            run_experiment,
        )  # torch and Lightning take seconds to import

        try:
            return run_experiment(config, HydraConfig.get())
        except NerveError as error:
            if show_tracebacks:
                raise
            failures.append(error)  # the other cells of a sweep go on
            return None

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, Exception) else ""
        _fail(f"{error}{cause}")
    except OSError as error:
        if started or show_tracebacks:
            raise
        _fail(
            f"The output directory must be writable; {error.filename}: {error.strerror}. "
            f"Choose another with hydra.run.dir=… (now in {Path.cwd()})."
        )
    if failures:
        _fail("\nnerve-run: ".join(str(failure) for failure in failures))


def _fail(message: str) -> NoReturn:
    print(f"nerve-run: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
