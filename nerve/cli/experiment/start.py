"""How `nerve-run` starts a run in its directory: as a new one, by continuing it, or not at all."""

import logging

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nerve.cli.config.compose import resolved
from nerve.cli.config.targets import foreign_targets
from nerve.files import as_store_error
from nerve.storage.directory import RunDirectory
from nerve.storage.provenance import cluster_job
from nerve.storage.record import RunRecord

log = logging.getLogger(__name__)


def is_done(run: RunDirectory, config: DictConfig) -> bool:
    """Whether the run of this configuration is done; if so, logs that.

    Raises:
        StoreError: when the directory holds a run of another configuration.
    """
    done = run.is_done(resolved(config))
    if done:
        _say_done(run.require_record())
    return done


def start(run: RunDirectory, config: DictConfig, hydra_config: HydraConf) -> RunRecord:
    """The record of the run that starts, continues, or is done; call it within the directory's
    lock.

    The errors are those of `RunDirectory.create_or_resume`.
    """
    values = resolved(config)
    is_new = run.record is None
    if is_new:
        _save(run, config, hydra_config)  # first: a record means that the start is complete
    is_trial = hydra_config.mode == RunMode.MULTIRUN
    record = run.create_or_resume(
        values,
        retry=values["retry"],
        job=cluster_job(),
        run_id=None if is_trial else OmegaConf.create({"id": "${run_id:}"}).id,
        sweep=run.path.parent.name if is_trial else None,
        seed=values["seed"],
    )
    if record.run_status == "done":
        _say_done(record)
    elif not is_new:
        log.info("resuming run %s in %s (restart %d)", record.run_id, run.path, record.restarts)
        for target in foreign_targets(values):
            log.warning("the configuration of this directory calls %s", target)
    return record


def _say_done(record: RunRecord) -> None:
    log.info(
        "run %s in %s is finished: validation loss %.3f; there is nothing to do",
        record.run_id,
        record.directory,
        record.final["val_loss"],
    )


def _save(run: RunDirectory, config: DictConfig, hydra_config: HydraConf) -> None:
    """Writes `.hydra/`, from which a run is resumed. Raises `StoreError` if it cannot be
    written."""
    for name, content in (
        ("config", config),
        ("hydra", OmegaConf.create({"hydra": hydra_config})),
        ("overrides", hydra_config.overrides.task),
    ):
        path = run.path / ".hydra" / f"{name}.yaml"
        with as_store_error(path):
            path.parent.mkdir(exist_ok=True)
            OmegaConf.save(content, path)
