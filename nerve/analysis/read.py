"""What many runs have stored, as they are read: their records as rows, and the rows of their parts,
some runs at once."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from nerve.analysis.gather import MOST_THREADS, Block, Coded, columns_of
from nerve.cores import allowed
from nerve.errors import StoreError
from nerve.storage.identity import completed, ids_of_plain
from nerve.storage.parts import read_parts
from nerve.storage.record import RunRecord
from nerve.storage.schema import Dataset

AT_ONCE = 16
"""Runs that a thread reads at once."""


class StoredRun(NamedTuple):
    """Which run is where."""

    run_id: str
    directory: Path


Derive = Callable[[Block, slice], Block]


@dataclass(frozen=True)
class Read:
    """What was read of some runs: their rows, and of each how many these are and what could not be
    read."""

    block: Block
    counts: list[int]
    unread: list[Sequence[StoreError]]


def reads(records: Sequence[StoredRun], dataset: Dataset, derive: Derive | None) -> Iterator[Read]:
    """The rows of all runs, some runs at once and in their order. A few threads read, each a little
    ahead: what is not taken yet is in memory.

    Args:
        records: of the runs.
        dataset: what is read.
        derive: makes more columns of the rows of some runs, which the slice names.
    """
    n_threads = min(allowed(), MOST_THREADS)
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[Read]] = deque()
        for start in range(0, len(records), AT_ONCE):
            runs = slice(start, min(start + AT_ONCE, len(records)))
            waiting.append(pool.submit(_read, records, dataset, runs, derive))
            if len(waiting) >= n_threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(
    records: Sequence[StoredRun], dataset: Dataset, runs: slice, derive: Derive | None
) -> Read:
    found = [_read_one(record, dataset) for record in records[runs]]
    counts, unread = [len(table) for table, _ in found], [errors for _, errors in found]
    table = pa.concat_tables([table for table, _ in found])
    del found
    ids = Coded.repeated([record.run_id for record in records[runs]], counts)
    block: Block = {"run_id": ids, **columns_of(table.drop_columns("run_id"))}
    del table  # half of the memory that this takes
    return Read(block if derive is None else derive(block, runs), counts, unread)


def _read_one(record: StoredRun, dataset: Dataset) -> tuple[pa.Table, Sequence[StoreError]]:
    """The rows of a run and what kept others from being read; a newer nerve's run has no rows."""
    try:
        return read_parts(record.directory, dataset, record.run_id)
    except StoreError as error:
        return dataset.schema.empty_table(), [error]


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
