"""Part files, `<dataset>/part-<step>.parquet`: how they are listed, read and written.

A part is a Parquet file with a checksum for each page and one for the footer. The format has none
for the footer, so it is stored in eight bytes before it: `FOOTER_MARK` and the CRC-32 of everything
that follows. Other readers ignore them. A file without them (an older part, or one rewritten by
another program) is read unverified.
"""

import os
import re
import time
import zlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nerve.errors import StoreError, warn_caller
from nerve.files import write_atomically
from nerve.storage.manifest import MANIFEST_NAME, missing_parts
from nerve.storage.schema import DATASETS, Dataset, check_version, encoding_of, fitted

FOOTER_MARK = b"NRVC"
_MARK_BYTES = 8
"""The mark and the checksum after it."""
_END_BYTES = 8
"""The end of a Parquet file: the footer's length in four bytes, and `PAR1`."""


_MOST_ATTEMPTS = 20
"""How often a run's parts are listed again because one of them has disappeared when opened."""


class DamagedPartWarning(UserWarning):
    """A Parquet part cannot be read and was left out; the message names the file and the reason."""


class DamagedPartError(StoreError):
    """A Parquet part that is missing or cannot be read as a part of its dataset."""


def part_path(directory: Path, dataset: Dataset, step: int) -> Path:
    """Path of the part with the rows flushed at `step`; padded, so that names sort like steps."""
    return directory / dataset.name / f"part-{step:012d}.parquet"


def part_step(path: Path) -> int:
    """The step in a part's name, the last one that it may contain; 0 for a foreign file."""
    match = re.fullmatch(r"part-(\d+)\.parquet", path.name)
    return int(match[1]) if match else 0


def list_parts(directory: Path, dataset: Dataset) -> list[Path]:
    """The dataset's parts, earliest first, without hidden files; none if there is no such folder.

    Raises:
        DamagedPartError: if the folder cannot be listed.
    """
    folder = directory / dataset.name
    try:
        with os.scandir(folder) as entries:
            names = [
                each.name
                for each in entries
                if each.name.endswith(".parquet")
                and not each.name.startswith(".")  # macOS adds such files on other file systems
                and (each.is_file(follow_symlinks=False) or not os.path.isdir(each.path))
            ]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise DamagedPartError(
            f"{folder} cannot be listed: {error}. Fix its permissions or restore it."
        ) from error
    paths = [folder / name for name in names]
    return sorted(paths, key=lambda path: (part_step(path), path.name)) if len(paths) > 1 else paths


def read_part(path: Path, dataset: Dataset, run_id: str | None = None) -> pa.Table:
    """Reads one part as a table with exactly the dataset's schema.

    Args:
        path: path of the part.
        dataset: the dataset that it belongs to.
        run_id: the run to which the rows must belong; None for any run.

    A nullable column that the part lacks, because an older nerve did not have it, is filled with
    null. A column that the schema lacks, such as one added by a user, is omitted, and a compaction
    drops it. Columns that nerve adds increase the schema version, so they are never omitted.

    Raises:
        DamagedPartError: if the file is truncated, overwritten or changed in a single byte, lacks a
            required column, or contains rows of another run.
        StoreError: if a newer nerve wrote it.
        FileNotFoundError: if it does not exist; a compaction may run while others read.
    """
    try:
        # Read all bytes at once: reading column by column would take one system call for each.
        with open(path, "rb", buffering=0) as stored, pa.BufferReader(stored.read()) as file:
            _verify_footer(file)
            with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as parquet:
                check_version(path, parquet.metadata.metadata)
                table = fitted(parquet.read(use_threads=False), dataset.schema)
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        raise _damaged(path, dataset, error) from error  # a broken link
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(path, dataset, error) from error
    others = set() if run_id is None else set(table["run_id"].unique().to_pylist()) - {run_id}
    if others:
        raise DamagedPartError(
            f"{path} contains rows of run {', '.join(sorted(others))}; the run of its directory is "
            f"{run_id}. Move it to the directory of its own run."
        )
    return table


def _damaged(path: Path, dataset: Dataset, error: Exception) -> DamagedPartError:
    return DamagedPartError(
        f"{path} is not a readable part of {dataset.name}: {error}. Restore it or move it away."
    )


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """The metadata of a part. Raises `pa.ArrowException`, `OSError` or `ValueError` for a file that
    is damaged or missing."""
    with pa.OSFile(os.fsencode(path)) as file:
        _verify_footer(file)
        return pq.read_schema(file).metadata or {}


def read_parts(
    directory: Path, dataset: Dataset, run_id: str | None = None
) -> tuple[pa.Table, list[DamagedPartError]]:
    """All rows of a run's dataset, each once, and an error for each part that is missing or had to
    be left out.

    Rows are in the order of the parts, earliest first; of duplicate rows, the one in the latest
    part is kept.
    """
    attempts = 0
    while True:
        tables: list[pa.Table] = []
        damaged: list[DamagedPartError] = []
        try:
            for path in list_parts(directory, dataset):
                try:
                    tables.append(read_part(path, dataset, run_id))
                except DamagedPartError as error:
                    damaged.append(error)
                except FileNotFoundError as error:
                    if attempts < _MOST_ATTEMPTS:
                        raise
                    damaged.append(_damaged(path, dataset, error))
        except FileNotFoundError:
            # Compacted between listing and reading: a new listing has all the rows, but on a
            # network file system it may lag behind.
            time.sleep(0.01 * attempts)
            attempts += 1
            continue
        # A single part, as in a run that has ended, was written without duplicate rows.
        table = joined(tables, dataset) if len(tables) > 1 else [*tables, _empty(dataset.name)][0]
        return table, damaged + missing_errors(directory, dataset)


@cache
def _empty(name: str) -> pa.Table:
    """A table without rows; not created on import, because pyarrow then searches for pandas."""
    return DATASETS[name].schema.empty_table()


def missing_errors(directory: Path, dataset: Dataset) -> list[DamagedPartError]:
    """One error for each part that was written but no longer exists."""
    return [
        DamagedPartError(
            f"{path} is missing: its rows were stored, but the file no longer exists. Restore it; "
            f"to continue without these rows, delete {directory / MANIFEST_NAME}."
        )
        for path in missing_parts(directory, dataset.name)
    ]


def joined(tables: Iterable[pa.Table], dataset: Dataset) -> pa.Table:
    """The rows of `tables` in their order; of rows with the same key, only the last."""
    table = pa.concat_tables([dataset.schema.empty_table(), *tables])
    rows = pa.array(np.arange(len(table)))
    keys = table.select(dataset.key).append_column("row", rows)
    groups = keys.group_by(list(dataset.key), use_threads=False)
    last = groups.aggregate([("row", "max")])["row_max"]
    return table if len(last) == len(table) else table.take(np.sort(last.to_numpy()))


def write_part(path: Path, table: pa.Table) -> None:
    """Writes `table` to `path` atomically. Raises `StoreError` if it cannot be written."""
    options = encoding_of(table.schema)

    def write(file: BinaryIO) -> None:
        parquet = pa.BufferOutputStream()
        pq.write_table(table, parquet, write_page_checksum=True, **options)
        file.write(_signed(parquet.getvalue().to_pybytes()))

    write_atomically(path, write)


# The footer contains columns, types, offsets, the version, and the parts merged by a compaction. A
# changed byte in the name of a nullable column would turn every value of the column into null.


def _signed(parquet: bytes) -> bytes:
    """A Parquet file with the mark and the checksum inserted before its footer."""
    start = _footer_start(len(parquet), parquet[-_END_BYTES:])
    pages, footer = parquet[:start], parquet[start:]
    return b"".join([pages, FOOTER_MARK, zlib.crc32(footer).to_bytes(4, "little"), footer])


def _footer_start(size: int, end: bytes) -> int:
    return size - _END_BYTES - int.from_bytes(end[:4], "little")


def _verify_footer(file: pa.NativeFile) -> None:
    """Raises `ValueError` if a footer does not match its checksum; accepts one without."""
    size = file.size()
    if size < _END_BYTES:
        return  # truncated: the Parquet reader raises an error
    file.seek(size - _END_BYTES)
    start = _footer_start(size, file.read(_END_BYTES))
    if start >= _MARK_BYTES:
        file.seek(start - _MARK_BYTES)
        signed, footer = file.read(_MARK_BYTES), file.read()
        if signed[:4] == FOOTER_MARK and signed[4:] != zlib.crc32(footer).to_bytes(4, "little"):
            raise ValueError("the checksum of its footer does not match")
    file.seek(0)


def warn_damaged(damaged: Iterable[DamagedPartError]) -> None:
    """Emits one `DamagedPartWarning` per part, at the line that called the store or the loader."""
    for error in damaged:
        warn_caller(f"Left out: {error}", DamagedPartWarning)
