"""`run.json`: what was run, where, how far it is and how it ended."""

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import as_store_error, write_atomically
from nerve.storage.identity import config_id, from_json, new_run_id, to_json
from nerve.storage.provenance import git_commit, package_versions

RECORD_NAME = "run.json"
RECORD_VERSION = 1
RUN_STATUSES = ("running", "done", "failed", "interrupted")
FIXED = ("directory", "run_id", "config_id", "started")


class DamagedRecordWarning(UserWarning):
    """A `run.json` cannot be read and its run was left out; the message names the file and why."""


class DamagedRecordError(StoreError):
    """A `run.json` that is cut short, overwritten, or not the record of a run."""


@dataclass(kw_only=True)
class RunRecord:
    """The record of one run; `create`, `update`, `restart` and `finish` write it atomically.

    Times are ISO 8601 in UTC; `heartbeat` is when the record was last written. `error` has `type`
    and `message`. `job` holds the cluster's own names for the run, `fingerprints` the hashes of
    `corpus`, `tokenizer` and `heldout`, `final` the last losses (`val_loss`, `bits_per_byte`, …),
    `pre_scales` what `model.pre_std` multiplied initial weights by (`ffn/00`, …).
    JSON knows no NaN and no infinity: in the file such a number of the configuration is an object,
    `{"float": "inf"}`, and any other null. (Version 0.1.0 wrote null in the configuration, too; it
    stays null, and such a run is not taken for one with an infinite value.)
    """

    directory: Path
    run_id: str
    config_id: str
    sweep: str | None = None
    run_status: str
    error: dict[str, str] | None = None
    started: str
    heartbeat: str
    ended: str | None = None
    restarts: int = 0
    job: dict[str, Any] | None = None
    step: int = 0
    seed: int | None = None
    n_parameters: int | None = None
    unigram_loss: float | None = None
    pre_scales: dict[str, float] = field(default_factory=dict)
    final: dict[str, float | None] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None
    host: str | None = None
    device: str | None = None
    config: dict[str, Any]

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        run_id: str | None = None,
        **values: Any,
    ) -> "RunRecord":
        """Starts the record of a new run with `run_status` running.

        Args:
            directory: the run directory; made if it is not there.
            config: the full resolved configuration, of plain values; `checkpoint`, `logger`,
                `objective` and the other `EXCLUDED` keys of nerve-run tell no runs apart.
            run_id: where the caller has made it already, for the directory's name.
            values: other fields, such as `sweep`, `seed`, `n_parameters`, `fingerprints`, `device`,
                `job`, `unigram_loss`; `versions` adds to those of the installed packages.

        Raises:
            StoreError: when the directory holds a run already, or cannot be written.
        """
        path = Path(directory) / RECORD_NAME
        if path.exists():
            raise StoreError(
                f"A run directory holds one run; {path} is the record of another. Resume that run, "
                "or choose a new directory."
            )
        now = _now()
        record = cls(
            directory=path.parent,
            run_id=run_id or new_run_id(),
            config_id=config_id(config),
            config=dict(config),
            run_status="running",
            started=now,
            heartbeat=now,
            host=socket.gethostname(),
            git_commit=git_commit(),
        )
        record.update(**{**values, "versions": package_versions() | values.get("versions", {})})
        return record

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "RunRecord":
        """Reads `<directory>/run.json`.

        `config_id` is made anew from the stored configuration: what an earlier version called it,
        in the file or in the name of the directory, does not matter.

        Raises:
            StoreError: when there is none or a newer nerve wrote it; its subclass
                `DamagedRecordError` when it is cut short or not the record of a run.
        """
        path = Path(directory) / RECORD_NAME
        try:
            values = json.loads(path.read_bytes())
            version = int(values.pop("schema_version"))
        except FileNotFoundError as error:
            raise StoreError(
                f"A run directory holds {RECORD_NAME}; {path.parent} has none. Give the directory "
                "of a run."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, error) from error
        if version > RECORD_VERSION:
            raise StoreError(
                f"This nerve reads records up to version {RECORD_VERSION}; {path} has version "
                f"{version}. Install the nerve that wrote it, or a newer one."
            )
        known = {entry.name for entry in fields(cls)} - {"directory", "config_id"}
        stored = {name: values[name] for name in known & values.keys()}
        try:
            record = cls(directory=path.parent, config_id="", **stored)
            record._check()
        except (TypeError, StoreError) as error:
            raise _damaged(path, error) from error
        record.config = from_json(record.config)
        record.config_id = config_id(record.config)
        return record

    @property
    def max_steps(self) -> int | None:
        """The last step, where the configuration has `trainer.max_steps`."""
        trainer = self.config.get("trainer")
        return trainer.get("max_steps") if isinstance(trainer, Mapping) else None

    @property
    def progress(self) -> str:
        """How far the run is, for people: `40/400`."""
        return str(self.step) if self.max_steps is None else f"{self.step}/{self.max_steps}"

    def update(self, **changes: Any) -> None:
        """Sets fields and writes the record; every update is also a heartbeat.

        Raises:
            StoreError: for a field that is not there or stays as it was at the start, an unknown
                `run_status`, or a file system that refuses; the record is then as before.
        """
        names = [entry.name for entry in fields(self) if entry.name not in FIXED]
        unknown = sorted(changes.keys() - set(names))
        if unknown:
            raise StoreError(
                f"An update sets fields of a run record: {', '.join(names)}; got "
                f"{', '.join(unknown)}. Put other values into final or job."
            )
        if "config" in changes:
            changes["config_id"] = config_id(changes["config"])
        before = dict(vars(self))
        vars(self).update({"heartbeat": _now(), **changes})
        try:
            self._check()
            self._write()
        except BaseException:
            vars(self).update(before)
            raise

    def restart(self, **changes: Any) -> None:
        """The run goes on in a new process: running again, with one more restart. Raises as above.

        `run_id` and `started` stay; the host is this one.
        """
        host = socket.gethostname()
        again: dict[str, Any] = {"run_status": "running", "error": None, "ended": None}
        self.update(**again, restarts=self.restarts + 1, host=host, **changes)

    def finish(self, run_status: str, error: BaseException | None = None, **changes: Any) -> None:
        """The process ends: `done`, `failed` or `interrupted`, with the error if that is why."""
        named = error and {"type": type(error).__name__, "message": str(error)}
        self.update(run_status=run_status, error=named, ended=_now(), **changes)

    def _check(self) -> None:
        if self.run_status not in RUN_STATUSES:
            raise StoreError(
                f"run_status is one of {', '.join(RUN_STATUSES)}; got {self.run_status!r}."
            )
        for name in ("config", "final", "fingerprints", "pre_scales", "versions"):
            if not isinstance(getattr(self, name), Mapping):
                raise StoreError(
                    f"{name} of a run record is a mapping; got {getattr(self, name)!r}."
                )

    def _write(self) -> None:
        values = {name: value for name, value in vars(self).items() if name != "directory"}
        plain = to_json({"schema_version": RECORD_VERSION, **values}, non_finite=lambda _: None)
        text = json.dumps(plain | {"config": to_json(self.config)}, indent=2)
        with as_store_error(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self.directory / RECORD_NAME, lambda file: file.write(text.encode()))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _damaged(path: Path, error: Exception) -> DamagedRecordError:
    return DamagedRecordError(
        f"{path} is not the record of a run: {error}. Restore it or move its directory away."
    )
