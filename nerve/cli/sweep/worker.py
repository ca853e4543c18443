"""A trial of a sweep in its own process, which `nerve.cli.entry.trial` starts.

The configuration comes on stdin.

Nothing that happens to such a process affects other trials. It saves and stops when its parent
process is gone.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig

from nerve.cli.config.compose import decoded, depends_on_place, identity, register, resolved
from nerve.cli.config.hydra_internals import Callbacks
from nerve.cores import uncollected
from nerve.errors import NerveError, StoreError, with_notes
from nerve.storage.directory import RunDirectory
from nerve.storage.provenance import cluster_job
from nerve.training.signals import Interrupted

STDIN = 0


def run_trial(config: DictConfig, hydra_config: HydraConf) -> float:
    """`run_experiment` for a trial, which leaves a record even if it fails before it begins."""
    with uncollected():  # torch and Lightning take seconds to import
        from nerve.cli.experiment.run import run_experiment

    run = RunDirectory(hydra_config.runtime.output_dir)
    _check_unchanged(config, run)
    try:
        return run_experiment(config, hydra_config)
    except StoreError:
        raise  # the directory belongs to another run, or cannot be written
    except (Exception, SystemExit) as error:
        from nerve.cli.experiment.machine import leads

        values = resolved(config)
        if leads(values["trainer"]) and run.path.is_dir() and run.reload().record is None:
            if isinstance(error, SystemExit):  # from a signal, or from its previous handler
                stopped = error if isinstance(error, Interrupted) else error.__context__
                record_end(run, values, "interrupted", stopped or error)
            else:
                record_end(run, values, "failed", error)
        raise


def _check_unchanged(config: DictConfig, run: RunDirectory) -> None:
    """Checks that a cluster job, which composes its configuration again, perhaps hours later, gets
    the submitted values."""
    if cluster_job() is None or depends_on_place(config):
        return
    sent, now = _id_of(run), identity(config)
    if sent not in (None, now):
        raise StoreError(
            f"A trial runs with the values that it was submitted with; {run.path} has "
            f"configuration {sent}, and the configuration files now give {now}. Restore "
            "them, or repeat the sweep command for trials with the new values."
        )


def _id_of(run: RunDirectory) -> str | None:
    """The id of this directory's trial; None if neither the record nor the name has it."""
    if run.record is not None:
        return run.record.config_id
    return run.path.name if re.fullmatch("[0-9a-f]{12}", run.path.name) else None


def record_end(
    run: RunDirectory, values: Mapping[str, Any], run_status: str, error: BaseException
) -> None:
    """Records how a trial ended if its run could not do so itself, or had not begun.

    Args:
        run: its directory.
        values: the resolved configuration.
        run_status: interrupted or failed.
        error: why.
    """
    sweep, seed = run.path.parent.name, values["seed"]
    record = run.record or run.create(values, sweep=sweep, seed=seed, job=cluster_job())
    record.finish(run_status, error=error)


def main() -> None:
    """Runs the trial whose configuration comes on stdin, which stays open as long as the trial is
    wanted."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with open(STDIN, "rb", buffering=0, closefd=False) as stdin:
        line = stdin.readline()
    if not line.endswith(b"\n"):  # the parent process is gone
        sys.exit(128 + signal.SIGINT)
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    register()
    setup_globals()
    try:
        sys.exit(0 if _run(decoded(line)) else 1)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _run(config: DictConfig) -> bool:
    """Runs the trial as Hydra runs a job; returns whether it was done."""
    done = False

    def task(task_config: DictConfig) -> None:
        nonlocal done
        try:
            run_trial(task_config, HydraConfig.get())
            done = True
        except NerveError as error:
            print(f"nerve-run: {with_notes(error)}", file=sys.stderr)
        except Exception:
            traceback.print_exc()

    run_job(
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
        hydra_context=HydraContext(
            config_loader=None,  # type: ignore[arg-type]  # all is composed
            callbacks=Callbacks(config),
        ),
    )
    return done


def _stop_when_alone() -> None:
    while os.read(STDIN, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
