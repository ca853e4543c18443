"""Reads the rows of many runs into one frame, keeping each value in memory only once.

Ten thousand runs have some ten million rows. Concatenating frames temporarily takes twice the
memory, and a string of 16 letters in each row takes as much as two numbers. Rows are therefore
gathered block by block and column by column, and strings are stored as integer codes.
"""

import itertools
import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from nerve.cores import allowed
from nerve.errors import StoreError
from nerve.storage.parts import read_parts
from nerve.storage.schema import Dataset

_ROOM = 1.02
"""How much larger a column is allocated than the rows so far suggest. Pages that are never written
take no memory."""

_CODES_AT_ONCE = 1 << 20
"""Codes that are renumbered at once: indexing temporarily takes 8 bytes each."""

MOST_THREADS = 4
"""The most threads that read, and that gather; each reader holds the rows of its runs in memory."""


@dataclass(frozen=True)
class Coded:
    """Strings as integer codes: `texts[code]`; the code -1 stands for no string."""

    codes: np.ndarray
    texts: tuple[str, ...]

    @classmethod
    def of(cls, values: pd.Series) -> "Coded":
        """The strings of a column."""
        codes, texts = pd.factorize(values)
        return cls(codes, tuple(texts))

    @classmethod
    def used(cls, codes: np.ndarray, texts: Sequence[str]) -> "Coded":
        """The same, without strings that no code refers to."""
        is_used = np.bincount(codes + 1, minlength=len(texts) + 1)[1:] > 0
        if is_used.all():
            return cls(codes, tuple(texts))
        own = np.append(np.cumsum(is_used) - 1, -1).astype(codes.dtype)
        return cls(own[codes], tuple(itertools.compress(texts, is_used)))

    @classmethod
    def repeated(cls, texts: Sequence[str], counts: Sequence[int]) -> "Coded":
        """Each of several distinct strings, repeated as often as `counts` says."""
        used = [text for text, n in zip(texts, counts, strict=True) if n]
        numbers = np.arange(len(used), dtype=_kind(len(used)))
        return cls(numbers.repeat([n for n in counts if n]), tuple(used))

    def equal(self, text: str) -> np.ndarray:
        """Which values equal this string."""
        if text not in self.texts:
            return np.zeros(len(self.codes), bool)
        return np.asarray(self.codes == self.texts.index(text))

    def repeat(self, counts: np.ndarray) -> "Coded":
        """Each value, repeated as often as `counts` says."""
        codes = self.codes.astype(_kind(len(self.texts)))
        return Coded(codes.repeat(counts), self.texts)

    def categorical(self) -> pd.Categorical:
        return _categorical(self.codes, self.texts)


Block = Mapping[str, np.ndarray | Coded]
"""Columns of equal length; all blocks have the same columns."""


BLOCK_BYTES = 8 << 20
"""About how many bytes of rows a thread reads at once. Threads take turns for each operation on a
column: 3,000 runs of 300 kB take 1.6 times as long in blocks of 4 runs, and 1.3 times in blocks of
8, as in blocks of 32."""

MOST_AT_ONCE = 64
"""The most runs that a thread reads at once, because those that follow may be larger."""


class StoredRun(NamedTuple):
    """The id and the directory of a run."""

    run_id: str
    directory: Path


Derive = Callable[[Block, slice], Block]


@dataclass(frozen=True)
class Read:
    """The rows of several runs, their size as they are stored in memory, and for each run the
    number of its rows and the errors of what could not be read."""

    block: Block
    n_bytes: int
    counts: list[int]
    unread: list[Sequence[StoreError]]

    def next_at_once(self) -> int:
        """How many runs to read at once next: as many as make a block, if they are like these."""
        n_runs = len(self.counts)
        fitting = BLOCK_BYTES * n_runs // max(self.n_bytes, 1)
        return max(1, min(fitting, 2 * n_runs, MOST_AT_ONCE))


def reads(records: Sequence[StoredRun], dataset: Dataset, derive: Derive | None) -> Iterator[Read]:
    """Reads the rows of all runs, several runs at a time, in order. A few threads read ahead, and
    hold their results in memory until they are consumed.

    Args:
        records: the runs.
        dataset: the dataset to read.
        derive: adds columns to the rows of several runs, which the slice selects.
    """
    n_threads = min(allowed(), MOST_THREADS)
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[Read]] = deque()
        start, at_once = 0, 1
        while start < len(records) or waiting:
            if start < len(records) and len(waiting) <= n_threads:
                runs = slice(start, min(start + at_once, len(records)))
                waiting.append(pool.submit(_read, records, dataset, runs, derive))
                start = runs.stop
            else:
                read = waiting.popleft().result()
                at_once = read.next_at_once()
                yield read


def _read(
    records: Sequence[StoredRun], dataset: Dataset, runs: slice, derive: Derive | None
) -> Read:
    found = [_read_one(record, dataset) for record in records[runs]]
    counts, unread = [len(table) for table, _ in found], [errors for _, errors in found]
    table = pa.concat_tables([table for table, _ in found])
    del found
    ids = Coded.repeated([record.run_id for record in records[runs]], counts)
    block: Block = {"run_id": ids, **columns_of(table.drop_columns("run_id"))}
    n_bytes = table.nbytes
    del table  # halves the memory that this takes
    return Read(block if derive is None else derive(block, runs), n_bytes, counts, unread)


def _read_one(record: StoredRun, dataset: Dataset) -> tuple[pa.Table, Sequence[StoreError]]:
    """The rows of a run and the errors of parts that cannot be read; no rows for a run of a newer
    nerve."""
    try:
        return read_parts(record.directory, dataset, record.run_id)
    except StoreError as error:
        return dataset.schema.empty_table(), [error]


def gather_columns(blocks: Iterable[tuple[Block, float]]) -> dict[str, np.ndarray | pd.Categorical]:
    """The columns of all blocks; strings become categories in alphabetical order.

    Args:
        blocks: at least one block, each with the estimated number of all rows as a multiple of
            those up to and including this block; it only determines how much memory is allocated at
            the start.
    """
    columns: dict[str, _Column] = {}
    n_threads = min(allowed(), MOST_THREADS)

    def append(block: Block, names: Sequence[str], times: float) -> None:
        for name in names:
            columns[name].append(block[name], times)

    # Most of the time goes into first-time memory allocation by the system.
    with ThreadPoolExecutor(n_threads) as pool:
        for block, times in blocks:
            names = list(block)
            columns = columns or {name: _Column(values) for name, values in block.items()}
            parts = [names[first::n_threads] for first in range(n_threads)]
            for part in [pool.submit(append, block, names, times) for names in parts]:
                part.result()
    return {name: own.finished() for name, own in columns.items()}


def frame_from_columns(columns: Mapping[str, Any]) -> pd.DataFrame:
    """A frame that shares memory with these arrays; strings become categories in their order."""
    # Without copy=False, pandas copies a dictionary into one block per dtype.
    return pd.DataFrame(
        {
            name: values.categorical() if isinstance(values, Coded) else values
            for name, values in columns.items()
        },
        copy=False,
    )


def columns_of(table: pa.Table) -> dict[str, np.ndarray | Coded]:
    """The columns of a table: strings as codes, and numbers with NaN for null."""
    return {
        field.name: _coded(column) if pa.types.is_string(field.type) else column.to_numpy()
        for field, column in zip(table.schema, table.columns, strict=True)
    }


def _coded(column: pa.ChunkedArray) -> Coded:
    """Arrow strings as codes."""
    chunks = column.dictionary_encode().chunks
    if not chunks:
        return Coded(np.empty(0, np.int8), ())
    codes = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in chunks])
    return Coded(codes, tuple(chunks[-1].dictionary.to_pylist()))


class _Column:
    """A growing array, whose unfilled part takes no physical memory.

    Args:
        first: values of the same kind, which are not appended.
    """

    def __init__(self, first: np.ndarray | Coded) -> None:
        self._numbers: dict[str, int] | None = {} if isinstance(first, Coded) else None
        self._values = _room(0, np.dtype(np.int8) if isinstance(first, Coded) else first.dtype)
        self._n = 0

    def append(self, values: np.ndarray | Coded, times: float) -> None:
        """Appends `values`; the final number of rows is estimated as `times` those so far."""
        own = self._own_codes(values) if isinstance(values, Coded) else values
        end = self._n + len(own)
        if own.dtype != self._values.dtype:  # codes of more strings need a larger type
            self._values = self._values.astype(np.result_type(own, self._values))
        if end > len(self._values):
            grown = _room(max(end, int(_ROOM * times * end)), self._values.dtype)
            grown[: self._n] = self._values[: self._n]
            self._values = grown
        self._values[self._n : end] = own
        self._n = end

    def finished(self) -> np.ndarray | pd.Categorical:
        """The values that were appended."""
        values = self._values[: self._n]
        if self._numbers is None:
            return values
        ordered = sorted(self._numbers)
        if ordered == [*self._numbers]:
            return _categorical(values, ordered)
        places = {text: place for place, text in enumerate(ordered)}
        order = np.array([*(places[text] for text in self._numbers), -1], values.dtype)
        for start in range(0, len(values), _CODES_AT_ONCE):
            some = values[start : start + _CODES_AT_ONCE]
            some[:] = order[some]
        return _categorical(values, ordered)

    def _own_codes(self, values: Coded) -> np.ndarray:
        """The codes of the strings in this column, in the smallest sufficient type."""
        numbers = self._numbers
        assert numbers is not None
        own = [numbers.setdefault(text, len(numbers)) for text in values.texts]
        return np.array([*own, -1], _kind(len(numbers)))[values.codes]


def _room(n: int, kind: np.dtype) -> np.ndarray:
    """An uninitialized array of `n` values, in memory without huge pages.

    NumPy requests huge pages for large arrays. A virtual machine may have returned its free huge
    pages to the host, and getting them back takes 2 s per gigabyte; small pages take .3 s. Where
    huge pages are cheap, small pages cost up to 1 s for a frame of 3.6 GB.
    """
    if kind.hasobject or not n:
        return np.empty(n, kind)
    size = n * kind.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, kind)


def _kind(n_texts: int) -> np.dtype:
    """The smallest integer type for the codes of `n_texts` strings and -1."""
    return np.min_scalar_type(-n_texts - 1)


def _categorical(codes: np.ndarray, texts: Iterable[str]) -> pd.Categorical:
    dtype = pd.CategoricalDtype(pd.Index([*texts], dtype=object).astype("str"))
    return pd.Categorical.from_codes(codes, dtype=dtype, validate=False)
