"""Records of runs as rows, one column for each leaf of theirs."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nerve.storage.identity import completed, ids_of_plain
from nerve.storage.record import RunRecord

TIMES = ("started", "heartbeat", "ended")

_PLAIN = frozenset({str, int, float, bool, type(None)})


class RunRows:
    """What records say, column by column. Configurations are not kept: of ten thousand runs they
    take as much memory as half a million rows."""

    def __init__(self) -> None:
        self._columns: dict[str, list[Any]] = {}
        self._places: dict[Path, int] = {}

    def take_from(self, record: RunRecord) -> None:
        """Adds the row of a record, and takes the configuration out of it."""
        place = self._places[record.directory] = len(self._places)
        row = _row(record)
        record.config = {}
        columns, intern = self._columns, sys.intern
        for name, value in row.items():
            column = columns.get(name)
            if column is None:
                column = columns[intern(name)] = [np.nan] * place
            column.append(intern(value) if type(value) is str else value)
        if len(row) < len(self._columns):
            for name in self._columns.keys() - row.keys():
                self._columns[name].append(np.nan)

    def frame(self, directories: Sequence[Path]) -> pd.DataFrame:
        """The rows of the runs in these directories, in their order."""
        places = [self._places[directory] for directory in directories]
        frame = pd.DataFrame(self._columns).take(places).reset_index(drop=True)
        for name in TIMES:
            frame[name] = pd.to_datetime(frame[name], utc=True, errors="coerce", format="ISO8601")
        return frame


def _row(record: RunRecord) -> dict[str, Any]:
    values = {name: value for name, value in vars(record).items() if name != "config"}
    values |= {"directory": str(record.directory), "job": record.job or {}}
    if record.error is not None:
        values["error"] = ": ".join(str(text) for text in record.error.values())
    _, values["design_id"] = ids_of_plain(record.config)
    row: dict[str, Any] = {}
    _add_leaves(row, completed(record.config), "")
    # A key of the configuration cannot take the name of what the record itself says (seed).
    _add_leaves(row, values, "")
    return row


def _add_leaves(row: dict[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    for key, value in values.items():
        if type(value) in _PLAIN:  # most are, of ten thousand runs
            row[prefix + key] = value
        elif isinstance(value, Mapping):
            _add_leaves(row, value, f"{prefix}{key}.")
        else:
            row[prefix + key] = json.dumps(value) if isinstance(value, list) else value
