"""The stored rows of many runs, read some runs at once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from nerve.analysis.gather import MOST_THREADS, Block, Coded, columns_of
from nerve.cores import allowed
from nerve.errors import StoreError
from nerve.storage.parts import read_parts
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
