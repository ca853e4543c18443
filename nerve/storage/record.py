"""The record of a run: what was run, where, its progress and how it ended."""

import os
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import as_store_error
from nerve.storage.columns import require_distinct
from nerve.storage.identity import ids_of_plain, new_run_id
from nerve.storage.json_values import to_json
from nerve.storage.provenance import git_commit, package_versions
from nerve.storage.record_fields import check_fields
from nerve.storage.record_file import RECORD_NAME, damaged_record, read_record, write_record

_UPDATING = threading.Lock()
"""The thread that trains and the heartbeat thread both write the record."""

FIXED = ("directory", "run_id", "config_id", "design_id", "started")


@dataclass(kw_only=True)
class RunRecord:
    """The record of one run; `create`, `update`, `restart` and `finish` write it atomically.

    Times are ISO 8601 in UTC; `heartbeat` is when the record was last written, and `advanced` when
    a heartbeat last found another step, or the run was last started. `error` has `type` and
    `message`. `job` holds the cluster's names for the run, `fingerprints` the hashes of
    `corpus`, `tokenizer` and `heldout`, `final` the last losses (`val_loss`, `bits_per_byte`, …),
    `pre_scales` the factors by which `model.pre_std` multiplied initial weights (`ffn/00`, …).
    `design_id` is `config_id` without the seed; it is not stored. `wandb_id` is the id of the run
    in wandb, `stopped_by` the reason for early stopping, and `warning` a warning about the results
    of a completed run.

    JSON has no NaN and no infinity: in the file, such a number is stored as `{"float": "inf"}` in
    the configuration and as null elsewhere. (Version 0.1.0 wrote null in the configuration, too; it
    is read as null, so such a run does not equal one with an infinite value.) The file has a
    `checksum` of its contents; a file without one is read unverified.
    """

    directory: Path
    run_id: str
    config_id: str
    sweep: str | None = None
    run_status: str
    error: dict[str, str] | None = None
    started: str
    heartbeat: str
    advanced: str | None = None
    ended: str | None = None
    restarts: int = 0
    job: dict[str, Any] | None = None
    step: int = 0
    seed: int | None = None
    n_parameters: int | None = None
    unigram_loss: float | None = None
    separator_token: str | None = None
    wandb_id: str | None = None
    pre_scales: dict[str, float] = field(default_factory=dict)
    stopped_by: str | None = None
    warning: str | None = None
    final: dict[str, float | None] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    host: str | None = None
    device: str | None = None
    config: dict[str, Any]
    design_id: str

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        run_id: str | None = None,
        **values: Any,
    ) -> "RunRecord":
        """Creates the record of a new run, with `run_status` running.

        Args:
            directory: the run directory, created if it does not exist.
            config: the full resolved configuration, of plain values. In one of nerve-run,
                `checkpoint`, `logger`, `objective` and the other `EXCLUDED` keys do not distinguish
                runs.
            run_id: the id, if the caller has already generated it for the name of the directory.
            values: other fields, such as `sweep`, `seed`, `n_parameters`, `fingerprints`, `device`,
                `job`, `unigram_loss`, `separator_token`; `versions` is added to those of the
                installed packages.

        Raises:
            StoreError: if the directory already holds a run, or cannot be written.
            ConfigError: if two values of the configuration would have the same name.
        """
        require_columns(config)
        path = Path(directory) / RECORD_NAME
        if path.exists():
            raise StoreError(
                f"A directory can hold only one run; {path} is the record of another. Resume that "
                "run, or choose a new directory."
            )
        started = now()
        own_id, design_id = ids_of_plain(to_json(config))
        record = cls(
            directory=path.parent,
            run_id=run_id or new_run_id(),
            config_id=own_id,
            design_id=design_id,
            config=dict(config),
            run_status="running",
            started=started,
            heartbeat=started,
            advanced=started,
            host=socket.gethostname(),
            git_commit=git_commit(),
        )
        with as_store_error(record.directory):
            record.directory.mkdir(parents=True, exist_ok=True)
        record.update(**{**values, "versions": package_versions() | values.get("versions", {})})
        return record

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "RunRecord":
        """Reads `<directory>/run.json`.

        `config_id` is recomputed from the stored configuration, whatever an earlier version wrote
        in the file or in the name of the directory.

        Raises:
            NoRecordError: if there is no run.
            DamagedRecordError: if it is truncated, not the record of a run, or missing.
            StoreError: if it was written by a newer nerve.
        """
        directory = Path(directory)
        values, canonical = read_record(directory)
        stored = {name: values[name] for name in _READ & values.keys()}
        try:
            record = cls(directory=directory, config_id="", design_id="", **stored)
            check_fields(vars(record))
        except (TypeError, StoreError) as error:
            raise damaged_record(directory, error) from error
        record.config_id, record.design_id = canonical.ids()
        return record

    @property
    def max_steps(self) -> int | None:
        """The last step, if the configuration has `trainer.max_steps`."""
        trainer = self.config.get("trainer")
        steps = trainer.get("max_steps") if isinstance(trainer, Mapping) else None
        return steps if isinstance(steps, int) else None

    @property
    def progress(self) -> str:
        """Progress of the run for display: `40/400`."""
        return str(self.step) if self.max_steps is None else f"{self.step}/{self.max_steps}"

    def update(self, **changes: Any) -> None:
        """Sets fields and writes the record; every update is also a heartbeat.

        Raises:
            StoreError: for an unknown or immutable field, an invalid value, a directory that was
                deleted or now belongs to another run, or a failed write; the record is then
                unchanged.
        """
        names = [entry.name for entry in fields(self) if entry.name not in FIXED]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            raise StoreError(
                f"An update can only set the fields {', '.join(names)}; got "
                f"{', '.join(unknown)}. Put other values into final or job."
            )
        if isinstance(changes.get("config"), Mapping):  # anything else is rejected below
            ids = ids_of_plain(to_json(changes["config"]))
            changes["config_id"], changes["design_id"] = ids
        with _UPDATING:
            changes = {"heartbeat": now(), **changes}
            before = {name: getattr(self, name) for name in changes}
            vars(self).update(changes)
            try:
                check_fields(vars(self))
                self._write()
            except BaseException:
                vars(self).update(before)  # the others may have been set by another thread
                raise

    def restart(self, **changes: Any) -> None:
        """Continues the run in a new process: sets it to running and counts one more restart.

        `run_id` and `started` stay the same; the host is updated. Raises like `update`.
        """
        host = socket.gethostname()
        again: dict[str, Any] = {"run_status": "running", "error": None, "ended": None}
        n, at = self.restarts + 1, now()
        self.update(**again, restarts=n, host=host, advanced=at, **changes)

    def finish(self, run_status: str, error: BaseException | None = None, **changes: Any) -> None:
        """Ends the run as `done`, `failed` or `interrupted`, with the error if there was one."""
        named = error and {"type": type(error).__name__, "message": str(error)}
        self.update(run_status=run_status, error=named, ended=now(), **changes)

    def _write(self) -> None:
        own = {name: value for name, value in vars(self).items() if name in _WRITTEN}
        write_record(self.directory, own)


_WRITTEN = frozenset(entry.name for entry in fields(RunRecord)) - {"directory", "design_id"}
_READ = _WRITTEN - {"config_id"}
"""The fields that are read from a file; the others are determined anew."""


def require_columns(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if two values of a configuration would have the same name, in its file
    or as a column of `load_runs`."""
    require_distinct(config, {entry.name for entry in fields(RunRecord)})


def now() -> str:
    """The current time, in the format of records."""
    return datetime.now(UTC).isoformat(timespec="seconds")
