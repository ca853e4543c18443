"""Part files: `<dataset>/part-<step>.parquet`, how they are listed, read and written."""

import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nerve.errors import StoreError
from nerve.results.atomic import write_atomically
from nerve.results.schema import SCHEMA_VERSION, VERSION_KEY, Dataset


class DamagedPartWarning(UserWarning):
    """A Parquet part cannot be read and was left out; the message names the file and why."""


class DamagedPartError(StoreError):
    """A Parquet part that cannot be read as what its folder holds."""


def part_path(directory: Path, dataset: Dataset, step: int) -> Path:
    """The part that holds the rows flushed at `step`; padded, so that names sort as steps do."""
    return directory / dataset.name / f"part-{step:012d}.parquet"


def part_step(path: Path) -> int:
    """The step in a part's name, past which it holds no rows; 0 for a file that is not ours."""
    match = re.fullmatch(r"part-(\d+)\.parquet", path.name)
    return int(match[1]) if match else 0


def list_parts(directory: Path, dataset: Dataset) -> list[Path]:
    """The dataset's parts, earliest first; none if there is no such folder."""
    paths = (path for path in (directory / dataset.name).glob("*.parquet") if path.is_file())
    return sorted(paths, key=lambda path: (part_step(path), path.name))


def read_part(path: Path, dataset: Dataset) -> pa.Table:
    """One part as a table of exactly the dataset's schema.

    Raises:
        DamagedPartError: when the file is cut short, overwritten, or of other columns.
        StoreError: when a newer nerve wrote it.
        FileNotFoundError: when it is gone, for a compaction may run while others read.
    """
    try:
        with pq.ParquetFile(path) as file:
            check_version(path, file.schema_arrow.metadata)
            table = file.read(use_threads=False)
        # Casting costs as much as reading, and hardly any file needs it.
        same = table.schema.equals(dataset.schema)
        return table if same else table.select(dataset.schema.names).cast(dataset.schema)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise DamagedPartError(
            f"{path} is not a readable part of {dataset.name}: {error}. Restore it or move it away."
        ) from error


def read_parts(directory: Path, dataset: Dataset) -> tuple[pa.Table, list[DamagedPartError]]:
    """All rows of a run's dataset, each once, and the parts that had to be left out.

    Rows come earliest part first; of doubled rows the one in the latest part stays.
    """
    while True:
        tables: list[pa.Table] = []
        damaged: list[DamagedPartError] = []
        try:
            for path in list_parts(directory, dataset):
                try:
                    tables.append(read_part(path, dataset))
                except DamagedPartError as error:
                    damaged.append(error)
        except FileNotFoundError:
            continue  # compacted between listing and reading: the new listing has all the rows
        return joined(tables, dataset), damaged


def check_version(path: Path, metadata: dict[bytes, bytes] | None) -> None:
    """Raises `StoreError` for a file whose columns may mean what this version cannot know."""
    version = int((metadata or {}).get(VERSION_KEY, b"1"))
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"This nerve reads schema versions up to {SCHEMA_VERSION}; {path} has version "
            f"{version}. Install the nerve that wrote it, or a newer one."
        )


def joined(tables: Iterable[pa.Table], dataset: Dataset) -> pa.Table:
    """The rows of `tables` in their order; of rows that share the dataset's key, the last."""
    table = pa.concat_tables([dataset.schema.empty_table(), *tables])
    rows = pa.array(np.arange(len(table)))
    keys = table.select(dataset.key).append_column("row", rows)
    groups = keys.group_by(list(dataset.key), use_threads=False)
    last = groups.aggregate([("row", "max")])["row_max"]
    return table if len(last) == len(table) else table.take(np.sort(last.to_numpy()))


def write_part(path: Path, table: pa.Table) -> None:
    """Writes `table` at `path` atomically. Raises `StoreError` when the file system refuses."""
    # Measured numbers hardly repeat: a dictionary of them would be larger and slower to read.
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    write_atomically(
        path,
        lambda file: pq.write_table(table, file, compression="zstd", use_dictionary=texts),
    )


def warn_damaged(damaged: Iterable[DamagedPartError]) -> None:
    """One `DamagedPartWarning` a part, at the line that called the store or the loader."""
    for error in damaged:
        warnings.warn(f"Left out: {error}", DamagedPartWarning, stacklevel=4)
