"""How a run begins in its directory: as a new one, where it was left, or not at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nerve.cli.config.compose import resolved
from nerve.errors import StoreError
from nerve.storage.identity import differences
from nerve.storage.provenance import cluster_job
from nerve.storage.record import RECORD_NAME, RunRecord
from nerve.storage.state import RunState, open_run, wait_for_silence

log = logging.getLogger(__name__)

SHOWN = 5
"""Differing keys that an error names; more are counted."""


def final_loss(directory: Path, config: DictConfig) -> float | None:
    """The final validation loss of a run that is done; None where there is something to do.

    Raises:
        StoreError: when the directory holds a run of another configuration.
    """
    state, record = open_run(directory)
    if state != RunState.DONE:
        return None
    assert record is not None
    check_own(record, resolved(config))
    loss = record.final["val_loss"]
    assert loss is not None
    log.info(
        "run %s in %s is finished: validation loss %.3f; there is nothing to do",
        record.run_id,
        directory,
        loss,
    )
    return loss


def begin(directory: Path, config: DictConfig, hydra_config: HydraConf) -> RunRecord:
    """The record of the run that begins or goes on in `directory`, whose lock is held.

    Raises:
        RunIsBusyError: when a process of another host is at work in it.
        StoreError: when it holds a run of another configuration, or one that failed and `retry` is
            not asked for.
    """
    if not (directory / RECORD_NAME).exists():
        return _create(directory, config, hydra_config)
    values = resolved(config)
    wait_for_silence(directory)
    record = RunRecord.load(directory)
    check_own(record, values)
    if record.run_status == "failed" and not values["retry"]:
        error = ": ".join((record.error or {}).values())
        raise StoreError(
            f"A run that failed is not started again unasked; {directory} holds run "
            f"{record.run_id}, which failed with {error or 'an error'}. Mend the cause and add "
            "retry=true, or choose another directory with hydra.run.dir=…."
        )
    record.restart(config=values, job=cluster_job())
    log.info("run %s goes on in %s (restart %d)", record.run_id, directory, record.restarts)
    return record


def check_own(record: RunRecord, values: Mapping[str, Any]) -> None:
    """Raises `StoreError` unless the record is that of a run of these values."""
    different = differences(record.config, values)
    if different:
        shown = [f"{key} ({_at(record.config, key)}, now {_at(values, key)})" for key in different]
        more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        raise StoreError(
            f"A directory holds one run; {record.directory} holds run {record.run_id} "
            f"({record.run_status}) with other values of {', '.join(shown[:SHOWN])}{more}. "
            "Choose another directory with hydra.run.dir=…, or delete that one."
        )


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return "not there"
        config = config[name]
    return config


def _create(directory: Path, config: DictConfig, hydra_config: HydraConf) -> RunRecord:
    # Before the record, which says that all of a run's beginnings are there.
    for name, content in (
        ("config", config),
        ("hydra", OmegaConf.create({"hydra": hydra_config})),
        ("overrides", hydra_config.overrides.task),
    ):
        path = directory / ".hydra" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        OmegaConf.save(content, path)
    values = resolved(config)
    is_cell = hydra_config.mode == RunMode.MULTIRUN
    return RunRecord.create(
        directory,
        values,
        run_id=None if is_cell else OmegaConf.create({"id": "${run_id:}"}).id,
        sweep=directory.parent.name if is_cell else None,
        seed=values["seed"],
        job=cluster_job(),
    )
