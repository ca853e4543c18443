"""Part files: `<dataset>/part-<step>.parquet`, how they are listed, read and written.

A part is a Parquet file with a checksum of each page, and one of the footer, for which the format
has none: eight bytes before the footer, `FOOTER_MARK` and the CRC-32 of all that follows. Other
readers pass over them. A file without (an older part, or one that another program rewrote) is read
unverified.

Which parts a run must have says a list beside them, without which none would miss a deleted one. It
never names what the writer has taken away itself, whenever it is killed: a part is listed after it
was written, and struck off before it is removed. A part that is not listed is read all the same. A
run without a list (of version 0.1.0, or copied without hidden files) is read unverified. The list
is an object, the parts by dataset, and one line for each part that came later, so that a part costs
as much to list as the one before it. A line that was cut off ends it.
"""

import json
import os
import re
import time
import zlib
from collections.abc import Collection, Iterable, Mapping, Set
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nerve.errors import StoreError, warn_caller
from nerve.files import as_store_error, write_atomically
from nerve.storage.record import MANIFEST_NAME
from nerve.storage.schema import DATASETS, Dataset, check_version, encoding_of, fitted

FOOTER_MARK = b"NRVC"
_MARK_BYTES = 8
"""The mark and the checksum after it."""
_END_BYTES = 8
"""How a Parquet file ends: the footer's length, four bytes, and `PAR1`."""


_MOST_ATTEMPTS = 20
"""Times that a run's parts are listed again, as one of them is gone when it is opened."""


class DamagedPartWarning(UserWarning):
    """A Parquet part cannot be read and was left out; the message names the file and the reason."""


class DamagedPartError(StoreError):
    """A Parquet part that cannot be read as what its folder holds, or that is not there."""


def part_path(directory: Path, dataset: Dataset, step: int) -> Path:
    """The part that holds the rows flushed at `step`; padded, so that names sort as steps do."""
    return directory / dataset.name / f"part-{step:012d}.parquet"


def part_step(path: Path) -> int:
    """The step in a part's name, past which it holds no rows; 0 for a file that is not ours."""
    match = re.fullmatch(r"part-(\d+)\.parquet", path.name)
    return int(match[1]) if match else 0


def list_parts(directory: Path, dataset: Dataset) -> list[Path]:
    """The dataset's parts, earliest first, without hidden files; none if there is no such folder.

    Raises:
        DamagedPartError: when the folder cannot be listed.
    """
    folder = directory / dataset.name
    try:
        with os.scandir(folder) as entries:
            names = [
                each.name
                for each in entries
                if each.name.endswith(".parquet")
                and not each.name.startswith(".")  # what macOS puts beside files of other systems
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
    """One part as a table of exactly the dataset's schema.

    Args:
        path: of the part.
        dataset: what it holds.
        run_id: of the run whose rows these must be; None for any run's.

    A nullable column that the part lacks reads as null: an older nerve did not know it. A column
    that the dataset lacks, such as one that somebody added, is left out, and a compaction drops it.
    What nerve itself adds raises the version, so that it is never left out.

    Raises:
        DamagedPartError: when the file is cut short, overwritten, changed in a single byte that
            counts, lacks a required column, or holds rows of another run.
        StoreError: when a newer nerve wrote it.
        FileNotFoundError: when it is gone, for a compaction may run while others read.
    """
    try:
        # At once: each column by itself would be a call of the system.
        with open(path, "rb", buffering=0) as stored, pa.BufferReader(stored.read()) as file:
            _verify_footer(file)
            with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False) as parquet:
                check_version(path, parquet.metadata.metadata)
                table = fitted(parquet.read(use_threads=False), dataset.schema)
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        raise _damaged(path, dataset, error) from error  # of a link to nowhere, which stays
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _damaged(path, dataset, error) from error
    others = set() if run_id is None else set(table["run_id"].unique().to_pylist()) - {run_id}
    if others:
        raise DamagedPartError(
            f"{path} holds rows of run {', '.join(sorted(others))}; the run of its directory is "
            f"{run_id}. Move it to the directory of its own run."
        )
    return table


def _damaged(path: Path, dataset: Dataset, error: Exception) -> DamagedPartError:
    return DamagedPartError(
        f"{path} is not a readable part of {dataset.name}: {error}. Restore it or move it away."
    )


def read_metadata(path: Path) -> dict[bytes, bytes]:
    """What a part says of itself beside its rows. Raises `pa.ArrowException`, `OSError` or
    `ValueError` for a file that is damaged or gone."""
    with pa.OSFile(os.fsencode(path)) as file:
        _verify_footer(file)
        return pq.read_schema(file).metadata or {}


def read_parts(
    directory: Path, dataset: Dataset, run_id: str | None = None
) -> tuple[pa.Table, list[DamagedPartError]]:
    """All rows of a run's dataset, each once, and the parts that are missing or had to be left out.

    Rows come earliest part first; of doubled rows the one in the latest part stays.
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
            # Compacted between listing and reading: a new listing has all the rows. That of a
            # network's file system may be some time behind.
            time.sleep(0.01 * attempts)
            attempts += 1
            continue
        # One part, as a run that has ended has it, was written without doubled rows.
        table = joined(tables, dataset) if len(tables) > 1 else [*tables, _empty(dataset.name)][0]
        return table, damaged + missing_errors(directory, dataset)


@cache
def _empty(name: str) -> pa.Table:
    """A table without rows; pyarrow looks for pandas as it makes the first, so not on import."""
    return DATASETS[name].schema.empty_table()


def read_manifest(directory: Path) -> dict[str, set[str]]:
    """The names of the parts that a run must have, by dataset; empty where no list can be read."""
    parts: dict[str, set[str]] = {}
    try:
        with open(f"{directory}/{MANIFEST_NAME}", "rb", buffering=0) as file:
            lines = file.read().splitlines()
        for line in lines:
            entry = json.loads(line)
            for name, added in [entry] if isinstance(entry, list) else entry.items():
                parts.setdefault(str(name), set()).update(map(str, added))
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return parts


def write_manifest(directory: Path, parts: Mapping[str, Set[str]]) -> None:
    """Replaces the list. Raises `StoreError` when the file system refuses.

    It need not survive a power cut: without it, parts are read as they are.
    """
    text = json.dumps({name: sorted(parts[name]) for name in sorted(parts)}) + "\n"
    write_atomically(
        directory / MANIFEST_NAME, lambda file: file.write(text.encode()), durable=False
    )


def add_to_manifest(directory: Path, dataset: str, parts: Collection[str]) -> None:
    """Puts parts on the list. Raises `StoreError` when the file system refuses."""
    path = directory / MANIFEST_NAME
    line = json.dumps([dataset, sorted(parts)]) + "\n"
    with as_store_error(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def missing_parts(directory: Path, dataset: str) -> list[Path]:
    """The parts of a dataset that are listed and not there, also while the run is written."""

    folder = str(directory / dataset)

    def missing() -> set[Path]:
        listed = read_manifest(directory).get(dataset, set())
        return {Path(path) for name in listed if not os.path.exists(path := f"{folder}/{name}")}

    gone = missing()
    # What the writer has just removed is not listed any more by now.
    return sorted(gone & missing()) if gone else []


def missing_errors(directory: Path, dataset: Dataset) -> list[DamagedPartError]:
    """One error for each part that was written and is not there any more."""
    return [
        DamagedPartError(
            f"{path} is missing: its rows were stored and are not there any more. Restore it; to "
            f"do without them, delete {directory / MANIFEST_NAME}."
        )
        for path in missing_parts(directory, dataset.name)
    ]


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
    options = encoding_of(table.schema)

    def write(file: BinaryIO) -> None:
        parquet = pa.BufferOutputStream()
        pq.write_table(table, parquet, write_page_checksum=True, **options)
        file.write(_signed(parquet.getvalue().to_pybytes()))

    write_atomically(path, write)


# The footer names columns, types, places, the version, and what a compaction took over. A changed
# byte in the name of a nullable column would read as null in every row.


def _signed(parquet: bytes) -> bytes:
    """A Parquet file with the mark and the checksum before its footer."""
    start = _footer_start(len(parquet), parquet[-_END_BYTES:])
    pages, footer = parquet[:start], parquet[start:]
    return b"".join([pages, FOOTER_MARK, zlib.crc32(footer).to_bytes(4, "little"), footer])


def _footer_start(size: int, end: bytes) -> int:
    return size - _END_BYTES - int.from_bytes(end[:4], "little")


def _verify_footer(file: pa.NativeFile) -> None:
    """Raises `ValueError` where a footer is not what its checksum is of; passes one without."""
    size = file.size()
    if size < _END_BYTES:
        return  # cut, as the reader of Parquet will say
    file.seek(size - _END_BYTES)
    start = _footer_start(size, file.read(_END_BYTES))
    if start >= _MARK_BYTES:
        file.seek(start - _MARK_BYTES)
        signed, footer = file.read(_MARK_BYTES), file.read()
        if signed[:4] == FOOTER_MARK and signed[4:] != zlib.crc32(footer).to_bytes(4, "little"):
            raise ValueError("the checksum of its footer does not fit")
    file.seek(0)


def warn_damaged(damaged: Iterable[DamagedPartError]) -> None:
    """One `DamagedPartWarning` a part, at the line that called the store or the loader."""
    for error in damaged:
        warn_caller(f"Left out: {error}", DamagedPartWarning)
