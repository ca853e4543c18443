"""`run.json`: what was run, where, its progress and how it ended."""

import contextlib
import json
import os
import socket
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import as_store_error, require_there, write_atomically
from nerve.storage.columns import require_distinct
from nerve.storage.identity import Canonical, ids_of_plain, new_run_id
from nerve.storage.json_values import canonical_json, from_json, to_json
from nerve.storage.manifest import MANIFEST_NAME
from nerve.storage.provenance import git_commit, package_versions
from nerve.storage.record_fields import check_fields

RECORD_NAME = "run.json"
RECORD_VERSION = 1
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
"""The errors that arbitrary JSON can cause."""
_UPDATING = threading.Lock()
"""The thread that trains and the heartbeat thread both write the record."""

FIXED = ("directory", "run_id", "config_id", "design_id", "started")


class DamagedRecordWarning(UserWarning):
    """A `run.json` cannot be read and its run was left out; the message names the file and the
    reason."""


class NoRecordError(StoreError):
    """A directory without `run.json` and without data of a run."""


class DamagedRecordError(StoreError):
    """A `run.json` that is truncated, overwritten, not the record of a run, or missing although its
    run has stored data."""


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
            config: the full resolved configuration, of plain values; `checkpoint`, `logger`,
                `objective` and the other `EXCLUDED` keys of nerve-run do not distinguish runs.
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
        path = directory / RECORD_NAME
        try:
            with open(path, "rb", buffering=0) as file:
                data = file.read()
            values = json.loads(data)
            version = int(values["schema_version"])
        except (FileNotFoundError, NotADirectoryError) as error:
            left = left_by_a_run(directory)
            if left is not None:
                raise lost_record(left, path) from error
            raise NoRecordError(
                f"A run directory contains {RECORD_NAME}; {directory} has none. Pass the directory "
                "of a run."
            ) from error
        except _UNREADABLE as error:
            raise _damaged(path, error) from error
        if version > RECORD_VERSION:
            raise StoreError(
                f"This nerve reads records up to version {RECORD_VERSION}; {path} has version "
                f"{version}. Install the nerve that wrote it, or a newer one."
            )
        checksum = values.pop("checksum", None)
        config = values.get("config")
        canonical = Canonical.of(config if isinstance(config, dict) else {})
        if checksum not in (None, _checksum(values, canonical)):
            raise _damaged(
                path,
                "its checksum does not match, so it was changed after it was written (if you "
                "changed it yourself, delete the line with the checksum)",
            )
        stored = {name: values[name] for name in _READ & values.keys()}
        try:
            record = cls(directory=directory, config_id="", design_id="", **stored)
            check_fields(vars(record))
        except (TypeError, StoreError) as error:
            raise _damaged(path, error) from error
        record.config_id, record.design_id = canonical.ids()
        if b'"float"' in data:  # few records have a non-finite number
            record.config = from_json(record.config)
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
        values = {name: value for name, value in vars(self).items() if name in _WRITTEN}
        plain = to_json({"schema_version": RECORD_VERSION, **values}, non_finite=lambda _: None)
        plain["config"] = to_json(self.config)
        checksum = _checksum(plain, Canonical.of(plain["config"]))
        text = json.dumps(plain | {"checksum": checksum}, indent=2)
        require_there(self.directory)
        self._require_own()
        write_atomically(self.directory / RECORD_NAME, lambda file: file.write(text.encode()))

    def _require_own(self) -> None:
        """Raises `StoreError` if the directory now belongs to another run."""
        try:
            run_id = json.loads((self.directory / RECORD_NAME).read_bytes())["run_id"]
        except _UNREADABLE:
            return  # missing or damaged: it will be replaced
        if run_id != self.run_id:
            raise StoreError(
                f"A run writes only in its own directory; {self.directory} now belongs to run "
                f"{run_id} and no longer to run {self.run_id}, which stops. Do not move or replace "
                "a directory while its run is active."
            )


_WRITTEN = frozenset(entry.name for entry in fields(RunRecord)) - {"directory", "design_id"}
_READ = _WRITTEN - {"config_id"}
"""The fields that are read from a file; the others are determined anew."""


def require_columns(config: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if two values of a configuration would have the same name, in its file
    or as a column of `load_runs`."""
    require_distinct(config, {entry.name for entry in fields(RunRecord)})


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def left_by_a_run(directory: Path) -> Path | None:
    """A file in a directory that only a nerve run can have stored there; None if there is none."""
    parts = (directory / "metrics").glob("part-" + 12 * "[0-9]" + ".parquet")
    with contextlib.suppress(OSError):  # no permission, or just removed
        return next((path for path in (directory / MANIFEST_NAME, *parts) if path.is_file()), None)
    return None


def lost_record(left: Path, path: Path) -> DamagedRecordError:
    """The error for a run whose record `path` is missing, although it stored `left`."""
    return DamagedRecordError(
        f"{path} is missing, but {left} shows that it existed. Restore it from a copy, or move the "
        "directory away: its data cannot be interpreted without it."
    )


def _checksum(values: Mapping[str, Any], config: Canonical) -> str:
    """CRC-32 of the contents of a record, independent of its JSON formatting; `config` is that of
    its configuration, most of which other runs share."""
    if not isinstance(values.get("config"), dict):
        return f"{zlib.crc32(canonical_json(values).encode()):08x}"
    before = {key: value for key, value in values.items() if key < "config"}
    after = {key: value for key, value in values.items() if key > "config"}
    parts = (
        canonical_json(before)[1:-1],
        f'"config":{config.text}',
        canonical_json(after)[1:-1],
    )
    text = f"{{{','.join(part for part in parts if part)}}}"
    return f"{zlib.crc32(text.encode()):08x}"


def _damaged(path: Path, error: object) -> DamagedRecordError:
    return DamagedRecordError(
        f"{path} is not the record of a run: {error}. Restore it or move its directory away."
    )
