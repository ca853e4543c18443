"""One run, from its configuration to its run directory."""

import logging
import os
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig

from nerve import cores
from nerve.cli.console import print_all_letters
from nerve.cli.directories import SingleRunDirectory, TrialDirectory
from nerve.cli.experiment.build import (
    build_data,
    build_module,
    build_monitor,
    build_trainer,
    counts,
    data_dims_of,
    describe,
    log_configuration,
    scale_pre_activations,
    warn_of_narrow_inputs,
)
from nerve.cli.experiment.machine import (
    check_machine,
    gathering_of,
    leads,
)
from nerve.cli.experiment.plan import Plan
from nerve.cli.experiment.start import is_done, start
from nerve.cli.experiment.summary import final_scores, finish, objective_of
from nerve.config import pasted
from nerve.errors import DataError, NotGatheredError, StoppedError, StoreError, noted
from nerve.files import remove_temporaries
from nerve.measuring.departures import knowing_others, leave
from nerve.recording.heartbeat import Heartbeat
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore
from nerve.training.callbacks import StepNotes
from nerve.training.checkpoint_callback import Checkpointing
from nerve.training.checkpoint_files import check_checkpoint
from nerve.training.checkpoint_io import CheckpointFiles, require_other_files
from nerve.training.device_errors import explained
from nerve.training.ending import require_validated, stopped_by
from nerve.training.gathering import Gathering
from nerve.training.signals import Interrupted, StopSignals

log = logging.getLogger(__name__)


def run_experiment(config: DictConfig, hydra_config: HydraConf) -> float:
    """Trains, measures and records one run in Hydra's output directory.

    If the directory already holds the run, it is continued: a run that is done is left as it is,
    one that was interrupted or killed resumes from its last checkpoint, and one that failed is
    refused unless `retry` is set.

    Returns:
        What `objective` names, by default the final validation loss in nats per target. Of several
        processes, only the one that records the run knows more than the loss.

    Raises:
        NerveError: for errors that the user can fix; a run that had begun is recorded as failed.
        Interrupted: when a signal asked it to stop; it is recorded as interrupted.
    """
    print_all_letters()  # Hydra's handler logs to stdout
    plan = Plan.of(config)
    # Lightning's launcher may still log why it ends all processes.
    for name in ("lightning.fabric.utilities", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*LeafSpec", ".*`srun` command is available"):  # Lightning's
        warnings.filterwarnings("ignore", message=message)
    is_trial = hydra_config.mode == RunMode.MULTIRUN
    run = (TrialDirectory if is_trial else SingleRunDirectory)(hydra_config.runtime.output_dir)
    with gathering_of(plan.values["trainer"]) as gathering:
        # Of several processes, rank 0 records; it started the others with its directory.
        is_first = leads(plan.values["trainer"])
        if is_first and is_done(run, config):
            return objective_of(run, plan.objective)
        if not is_first:  # the first one logs what they have in common
            logging.getLogger("nerve").setLevel(logging.WARNING)
        check_machine(plan)
        require_other_files(plan.callbacks, run)
        with StopSignals() as signals:
            if not is_first:
                if gathering.begin():
                    return _follow(plan, run, signals, gathering)
                return objective_of(run, plan.objective)
            with run.locked():
                try:
                    record = start(run, config, hydra_config)
                    if record.run_status != "done":  # otherwise it has just finished
                        gathering.begin()
                        _lead(plan, run, record, signals, gathering)
                except Interrupted as interrupted:
                    signals.hold()
                    with noted(interrupted):
                        run.interrupt(interrupted)
                    raise
    return objective_of(run, plan.objective)


def _follow(plan: Plan, run: RunDirectory, signals: StopSignals, gathering: Gathering) -> float:
    """Runs a process that does not record the run."""
    try:
        with signals.of_all():
            return _run(plan, run, None, signals, None, gathering)
    except Interrupted as interrupted:
        signals.hold()
        leave(interrupted)  # if a second signal came before the fit could say so
        signals.hand_on()
        # A launcher regards any other exit status of a process that it started as a crash.
        raise SystemExit(0) from interrupted


def _lead(
    plan: Plan, run: RunDirectory, record: RunRecord, signals: StopSignals, gathering: Gathering
) -> None:
    """Runs the process that records how the run ends."""
    try:
        with Heartbeat(record) as heartbeat, signals.of_all():
            _run(plan, run, record, signals, heartbeat, gathering)
    except BaseException as error:
        signals.hold()
        if record.run_status != "done":  # otherwise something failed after the run
            _record_end(record, error)
        if isinstance(error, Interrupted):
            log.warning("%s; to resume: nerve-run %s", str(error), pasted("resume", run.path))
            signals.hand_on()
        raise
    if signals.received:  # after the run: nothing is left to save, but the command stops
        signals.hand_on()
        signals.stop()


def _give_up(record: RunRecord | None, error: NotGatheredError) -> None:
    """Prints and records that the run fails; its main thread still waits for a failed process."""
    text = f"nerve-run: {error}\n".encode(errors="backslashreplace")
    os.write(2, text)  # sys.stderr may be in the middle of a write
    if record:
        _record_end(record, error)


def _record_end(record: RunRecord, error: BaseException) -> None:
    if isinstance(error, StoppedError):
        error = Interrupted(str(error))
    interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
    try:
        record.finish("interrupted" if interrupted else "failed", error=error)
    except StoreError as refused:
        log.error("run.json cannot record how the run ended: %s", str(refused))


def _run(
    plan: Plan,
    run: RunDirectory,
    record: RunRecord | None,
    signals: StopSignals,
    heartbeat: Heartbeat | None,
    gathering: Gathering,
) -> float:
    _set_threads(plan.threads)
    L.seed_everything(plan.seed, verbose=False)

    store = run.store() if record else None
    monitor = build_monitor(plan, store)
    files = CheckpointFiles()
    saving = Checkpointing(files, run, plan.checkpoint, signals, store)
    callbacks = [monitor, saving, *([StepNotes(heartbeat)] if heartbeat else [])]
    trainer = build_trainer(plan, run.path, store, callbacks, files, gathering.environment)
    gathering.start_others(trainer)  # now, so that they do the following at the same time

    data = build_data(plan)
    log.info("data: %s", counts(data.describe()))
    saving.data_dims = data_dims_of(data, plan.model.kind)
    module = build_module(plan, saving.data_dims)
    last = run.checkpoint("last")
    # A resumed run has its weights in the checkpoint, and the factors in its record.
    pre_scales = {} if last.exists() else scale_pre_activations(plan, module, data)
    if record and store:
        _prepare(run, record, store, data)
        describe(record, module, data, trainer, pre_scales)
        warn_of_narrow_inputs(plan, saving.data_dims)
    log_configuration(trainer, plan)
    gathering.before(trainer)
    try:
        with (
            explained(run),
            gathering.watching(partial(_give_up, record)) as exits,
            knowing_others(exits),
        ):
            trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None)
    except BaseException as error:
        with noted(error):
            _close(trainer, record, store)
        raise
    _close(trainer, record, store)
    require_validated(monitor.n_validated, data.n_heldout_targets)
    reason = stopped_by(trainer)
    if reason is not None:
        log.info("training ended at step %s: %s", f"{trainer.global_step:,}", reason)
    final = {
        **final_scores(monitor.val_loss, saving.scores, data),
        "train_seconds": saving.seconds,
        "measuring_seconds": monitor.seconds,
    }
    if record:
        finish(run, record, final, reason, monitor.latest)
    return final["val_loss"]


def _set_threads(n: int | None) -> None:
    if n is not None:
        torch.set_num_threads(n)
    elif cores.are_fewer() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores.allowed())  # torch counts those of the host


def _close(trainer: L.Trainer, record: RunRecord | None, store: RunStore | None) -> None:
    """Compacts the rows of a finished fit, however it ended, into as few files as possible."""
    if record and store:
        record.step = trainer.global_step
        store.flush(trainer.global_step)
        store.compact()


def _prepare(run: RunDirectory, record: RunRecord, store: RunStore, data: Any) -> None:
    """Prepares the directory for continuing: from its last checkpoint, or from the start."""
    last = run.checkpoint("last")
    remove_temporaries(last.parent)
    if not last.exists():
        if record.restarts:
            log.warning(
                "there is no %s: the run starts from the beginning (checkpoint.every_n_minutes and "
                "checkpoint.every_n_steps say how often it is saved)",
                last,
            )
        store.truncate_after(-1)
        return
    check_checkpoint(last, record)
    if record.fingerprints != data.fingerprints:
        raise DataError(
            f"A run must be resumed with the same data; those of {run.path} had the fingerprints "
            f"{record.fingerprints}, now they are {data.fingerprints}. Restore the old data, or "
            "start a new run."
        )
