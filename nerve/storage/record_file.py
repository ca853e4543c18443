"""The file `run.json`: how it is written, read and verified, and the errors for a damaged one."""

import contextlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nerve.errors import StoreError
from nerve.files import require_there, write_atomically
from nerve.storage.identity import Canonical
from nerve.storage.json_values import canonical_json, from_json, to_json
from nerve.storage.manifest import MANIFEST_NAME

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


class DamagedRecordWarning(UserWarning):
    """A `run.json` cannot be read and its run was left out; the message names the file and the
    reason."""


class NoRecordError(StoreError):
    """A directory without `run.json` and without data of a run."""


class DamagedRecordError(StoreError):
    """A `run.json` that is truncated, overwritten, not the record of a run, or missing although its
    run has stored data."""


def read_record(directory: Path) -> tuple[dict[str, Any], Canonical]:
    """The values in `<directory>/run.json`, whose types are not checked, and the canonical form of
    their configuration.

    Raises:
        NoRecordError: if there is no run.
        DamagedRecordError: if it is truncated, not the record of a run, or missing.
        StoreError: if it was written by a newer nerve.
    """
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
        raise damaged_record(directory, error) from error
    if version > RECORD_VERSION:
        raise StoreError(
            f"This nerve reads records up to version {RECORD_VERSION}; {path} has version "
            f"{version}. Install the nerve that wrote it, or a newer one."
        )
    checksum = values.pop("checksum", None)
    config = values.get("config")
    config = config if isinstance(config, dict) else {}
    canonical = Canonical.of(config)
    if checksum not in (None, _checksum(values, canonical)):
        raise damaged_record(
            directory,
            "its checksum does not match, so it was changed after it was written (if you "
            "changed it yourself, delete the line with the checksum)",
        )
    if config and b'"float"' in data:  # few records have a non-finite number
        values["config"] = from_json(config)
    return values, canonical


def write_record(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes the values of the run `run_id` to `<directory>/run.json`, atomically.

    Raises:
        StoreError: if the directory was deleted or belongs to another run, or the write failed.
    """
    plain = to_json({"schema_version": RECORD_VERSION, **values}, non_finite=lambda _: None)
    plain["config"] = to_json(values["config"])
    checksum = _checksum(plain, Canonical.of(plain["config"]))
    text = json.dumps(plain | {"checksum": checksum}, indent=2)
    require_there(directory)
    _require_own(directory, values["run_id"])
    write_atomically(directory / RECORD_NAME, lambda file: file.write(text.encode()))


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


def damaged_record(directory: Path, reason: object) -> DamagedRecordError:
    """The error for a `run.json` that is not the record of a run."""
    return DamagedRecordError(
        f"{directory / RECORD_NAME} is not the record of a run: {reason}. Restore it or move its "
        "directory away."
    )


def _require_own(directory: Path, own_id: str) -> None:
    """Raises `StoreError` if the directory now belongs to another run."""
    try:
        run_id = json.loads((directory / RECORD_NAME).read_bytes())["run_id"]
    except _UNREADABLE:
        return  # missing or damaged: it will be replaced
    if run_id != own_id:
        raise StoreError(
            f"A run writes only in its own directory; {directory} now belongs to run "
            f"{run_id} and no longer to run {own_id}, which stops. Do not move or replace "
            "a directory while its run is active."
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
