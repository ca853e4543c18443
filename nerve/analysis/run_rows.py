"""The frame of `load_runs`: a row for each record, with a column for each leaf of its
configuration."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nerve.storage.columns import CONFIGURED
from nerve.storage.identity import (
    completed_key,
    completed_keys,
    content_of,
    is_of_nerve_run,
)
from nerve.storage.record import RunRecord

TIMES = ("started", "heartbeat", "advanced", "ended")

_INEXACT = 2**53
"""From here on, not every integer is a float."""

_PLAIN = frozenset({int, float, bool, type(None)})

_MOST_LEAVES = 4096
"""The most values of top-level keys whose leaves are kept."""


class RunRows:
    """The contents of records, column by column. Configurations are not kept: those of ten thousand
    runs take as much memory as half a million rows."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {}
        self._places: dict[Path, int] = {}
        self._leaves: dict[tuple[str, bytes | str, bool], dict[str, Any]] = {}

    def take_from(self, record: RunRecord) -> None:
        """Adds the row of a record, and removes the configuration from the record."""
        place = self._places[record.directory] = len(self._places)
        config, completes = record.config, is_of_nerve_run(record.config)
        row: dict[str, Any] = {}
        for key in completed_keys(config) if completes else config:
            _add(row, self._leaves_of(config, key, completes))
        own = leaves(own_values(record))
        taken = {name: row.pop(name) for name in row.keys() & own.keys()}
        if type(taken.get("seed")) is int:  # that of the record
            del taken["seed"]
        _add(row, taken, CONFIGURED)  # such as a caller's `device`
        row |= own
        record.config = {}
        columns = self._columns
        for name, value in row.items():
            column = columns.get(name)
            if column is None:
                column = columns[name] = [np.nan] * place
            column.append(value)
        if len(row) < len(columns):
            for name in columns.keys() - row.keys():
                columns[name].append(np.nan)

    def _leaves_of(self, config: Mapping[str, Any], key: str, completes: bool) -> dict[str, Any]:
        """The leaves of a top-level key of a configuration; they are found once for equal values.

        Args:
            completes: whether keys are added that the configuration is too old to have.
        """
        content = content_of(config[key]) if key in config else ""
        name = key, content, completes
        found = self._leaves.get(name)
        if found is None:
            if len(self._leaves) >= _MOST_LEAVES:
                self._leaves.clear()
            value = completed_key(config, key) if completes else config[key]
            found = self._leaves[name] = leaves({key: value})
        return found

    def frame(self, directories: Sequence[Path]) -> pd.DataFrame:
        """The rows of the runs in these directories, in this order."""
        places = [self._places[directory] for directory in directories]
        frame = pd.DataFrame(self._columns)
        if places != [*range(len(frame))]:
            frame = frame.take(places).reset_index(drop=True)
        for name in frame.select_dtypes("float64").columns:
            values = self._columns[name]
            if frame[name].abs().max() >= _INEXACT and any(
                type(value) is int and float(value) != value for value in values
            ):  # beside missing values, different seeds would become the same float
                frame[name] = pd.Series([values[place] for place in places], dtype=object)
        for name in TIMES:
            frame[name] = pd.to_datetime(frame[name], utc=True, errors="coerce", format="ISO8601")
        return frame


def own_values(record: RunRecord) -> dict[str, Any]:
    """The fields of a record for its row, without the configuration."""
    values = {name: value for name, value in vars(record).items() if name != "config"}
    values |= {"directory": str(record.directory), "job": record.job or {}}
    configured = record.config.get("seed")
    if record.seed is None and type(configured) is int:  # records of earlier versions may lack it
        values["seed"] = configured
    if record.error is not None:
        values["error"] = ": ".join(filter(None, map(str, record.error.values())))
    return values


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names; lists as JSON."""
    row: dict[str, Any] = {}
    for key, value in values.items():
        name = sys.intern(prefix + key)
        if type(value) is str:  # the usual cases, checked first for speed
            value = sys.intern(_unicode(value))
        elif type(value) not in _PLAIN:
            if isinstance(value, Mapping):
                _add(row, leaves(value, f"{name}."))
                continue
            value = sys.intern(json.dumps(value)) if isinstance(value, list) else value
        row[name if name not in row else _free(row, name)] = value
    return row


def _add(row: dict[str, Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """Adds values to a row. A value whose name is taken, as may happen in records of earlier
    versions, gets another name: see `require_distinct`."""
    if not prefix and row.keys().isdisjoint(values):
        row |= values
        return
    for name, value in values.items():
        row[_free(row, prefix + name)] = value


def _free(row: Mapping[str, Any], name: str) -> str:
    while name in row:
        name = CONFIGURED + name
    return name


def _unicode(text: str) -> str:
    """The text with characters that are not valid Unicode escaped, such as bytes of a path."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
