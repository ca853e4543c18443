"""Writes a run's Parquet datasets, so that no interruption leaves rows incomplete, lost or
doubled."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from nerve.errors import StoreError
from nerve.files import as_store_error, remove_temporaries, require_there, sync_directory
from nerve.storage.manifest import add_to_manifest, read_manifest, write_manifest
from nerve.storage.parts import (
    DamagedPartError,
    joined,
    list_parts,
    missing_errors,
    part_path,
    part_step,
    read_metadata,
    read_part,
    read_parts,
    warn_damaged,
    write_part,
)
from nerve.storage.schema import DATASETS, Dataset, table_of

log = logging.getLogger(__name__)

COMPACTED_KEY = b"nerve_compacted"


class RunStore:
    """Appends rows to `metrics/`, `spectra/`, `scalars/` and `groups/` of one run directory.

    Rows are buffered in memory until `flush`; a killed run loses only these. A run has one writing
    process. Opening a store completes what a killed writer left behind: an interrupted compaction,
    temporary files.

    A list of the parts is stored with them, so that a deleted part is noticed.

    Three rules make every interruption harmless:
    - a part is written atomically, by `os.replace`, and rows never go to a part earlier than the
      last one, so that of duplicate rows the one in the later part is the newer;
    - `compact` writes all rows to the place of the last part, with a mark that names the other
      parts, before it removes those; any that remain are removed when the store is next opened;
    - `truncate_after` writes the rows it keeps before it removes any, earliest part first.

    Raises:
        StoreError: if the directory cannot be written.
    """

    def __init__(self, directory: str | os.PathLike[str], run_id: str) -> None:
        self.directory = Path(directory)
        self.run_id = run_id
        self._buffers: dict[str, list[pa.Table]] = {name: [] for name in DATASETS}
        self._listed = {name: set[str]() for name in DATASETS} | read_manifest(self.directory)
        # The step of each dataset's last part, so that a flush need not list the parts.
        self._latest = dict.fromkeys(DATASETS, 0)
        with as_store_error(self.directory):
            for dataset in DATASETS.values():
                folder = self.directory / dataset.name
                if not dataset.is_optional:
                    folder.mkdir(parents=True, exist_ok=True)
                elif not folder.is_dir():
                    continue
                remove_temporaries(folder)
                self._finish_compaction(dataset)
                parts = list_parts(self.directory, dataset)
                self._listed[dataset.name] |= {path.name for path in parts}
                self._latest[dataset.name] = max(map(part_step, parts), default=0)
            remove_temporaries(self.directory)
        if any(self._listed.values()):  # rewrites a list that is damaged or missing
            write_manifest(self.directory, self._listed)
        _warn_of_columns(self.directory)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Buffers rows of the `metrics` dataset, one mapping per row; `run_id` and nullable columns
        may be omitted.

        Raises:
            StoreError: for an unknown or missing column or a value of the wrong type; none of
                `rows` is then buffered.
        """
        self._append("metrics", rows)

    def append_spectra(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Buffers rows of `spectra`; `eigenvalues` is a 1-D array or sequence. Raises as above."""
        self._append("spectra", rows)

    def append_scalars(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Buffers rows of `scalars`. Raises as above."""
        self._append("scalars", rows)

    def append_groups(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Buffers rows of `groups`. Raises as above."""
        self._append("groups", rows)

    def flush(self, step: int) -> None:
        """Writes the buffered rows of each dataset, durably, to the part of `step`.

        If that part exists, the rows are merged, and new rows replace old ones with the same key.
        If there are rows or parts after `step`, the part is named after the latest of their steps;
        if the part of that name is damaged, it is left as it is and the next free name is used.

        Raises:
            StoreError: if the disk is full or the write fails; rows that were not written stay
                buffered, so that a later flush can succeed.
        """
        for dataset in DATASETS.values():
            tables = self._buffers[dataset.name]
            if not any(len(table) for table in tables):
                continue
            latest = max(pc.max(table["step"]).as_py() for table in tables if len(table))
            path, earlier = self._part(dataset, max(step, latest, self._latest[dataset.name]))
            self._write(dataset, path, joined([*earlier, *tables], dataset))
            self._buffers[dataset.name] = []

    def compact(self) -> None:
        """Merges each dataset into one part, sorted by its key, without duplicate rows.

        A dataset with a damaged or missing part is left as it is, with a `DamagedPartWarning`.
        Buffered rows stay buffered.

        Raises:
            StoreError: if the file system refuses; every row can still be read.
        """
        for dataset in DATASETS.values():
            parts = list_parts(self.directory, dataset)
            if len(parts) < 2:
                continue
            table, damaged = read_parts(self.directory, dataset, self.run_id)
            if damaged:
                warn_damaged(damaged)
                continue
            ordered = table.sort_by([(name, "ascending") for name in dataset.key])
            mark = json.dumps([path.name for path in parts[:-1]])
            metadata = {**dataset.schema.metadata, COMPACTED_KEY: mark}
            self._write(dataset, parts[-1], ordered.replace_schema_metadata(metadata))
            self._remove(dataset, parts[:-1])

    def truncate_after(self, step: int) -> None:
        """Drops all rows after `step`, stored or buffered, so that a run can resume there.

        A damaged part is left as it is, with a `DamagedPartWarning`; a missing part is reported
        likewise.

        Raises:
            StoreError: for a step that is not an integer, and if the file system refuses; the next
                call then completes the removal.
        """
        if not isinstance(step, Integral) or isinstance(step, bool):
            raise StoreError(
                f"The step after which rows are dropped must be a whole number (-1 drops all); got "
                f"{step!r}. Pass the step from which the run resumes."
            )
        for dataset in DATASETS.values():
            waiting = self._buffers[dataset.name]
            self._buffers[dataset.name] = [_until(step, table) for table in waiting]
            late: dict[Path, pa.Table] = {}
            for path in list_parts(self.directory, dataset):
                try:
                    table = read_part(path, dataset, self.run_id)
                except DamagedPartError as error:
                    warn_damaged([error])
                    continue
                kept = _until(step, table)
                if len(kept) < len(table):
                    late[path] = kept
            self._replace(dataset, int(step), late)
            warn_damaged(missing_errors(self.directory, dataset))

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        self._buffers[name].append(table_of(DATASETS[name], rows, self.run_id))

    def _part(self, dataset: Dataset, step: int) -> tuple[Path, list[pa.Table]]:
        """The part of `step`, or the next one that is not damaged, and its rows if it exists."""
        while True:
            path = part_path(self.directory, dataset, step)
            try:
                return path, [read_part(path, dataset, self.run_id)] if path.exists() else []
            except DamagedPartError:
                step += 1

    def _replace(self, dataset: Dataset, step: int, late: dict[Path, pa.Table]) -> None:
        """Moves the rows to keep of the parts `late` into the part of `step`."""
        if any(len(kept) for kept in late.values()):
            target, earlier = self._part(dataset, step)
            kept = [*([] if target in late else earlier), *late.values()]
            self._write(dataset, target, joined(kept, dataset))
            late.pop(target, None)
        self._remove(dataset, list(late))

    def _finish_compaction(self, dataset: Dataset) -> None:
        for path in list_parts(self.directory, dataset):
            self._remove(dataset, [path.with_name(name) for name in _compacted_names(path)])

    def _write(self, dataset: Dataset, path: Path, table: pa.Table) -> None:
        require_there(self.directory)
        with as_store_error(path):
            path.parent.mkdir(exist_ok=True)
        write_part(path, table)
        self._latest[dataset.name] = max(self._latest[dataset.name], part_step(path))
        self._list(dataset, [path])

    def _remove(self, dataset: Dataset, paths: Sequence[Path]) -> None:
        self._list(dataset, (), without=paths)
        for path in paths:
            with as_store_error(path):
                path.unlink(missing_ok=True)
                sync_directory(path.parent)
        if paths:
            left = list_parts(self.directory, dataset)
            self._latest[dataset.name] = max(map(part_step, left), default=0)

    def _list(self, dataset: Dataset, paths: Iterable[Path], without: Iterable[Path] = ()) -> None:
        """Adds parts to the list of those that must exist, or removes them from it."""
        listed = self._listed[dataset.name]
        new = {path.name for path in paths} - listed
        gone = listed & {path.name for path in without}
        listed |= new
        listed -= gone
        if gone:
            write_manifest(self.directory, self._listed)
        elif new:
            add_to_manifest(self.directory, dataset.name, new)


def _until(step: int, table: pa.Table) -> pa.Table:
    return table.filter(pc.less_equal(table["step"], step))


def _compacted_names(path: Path) -> list[str]:
    """The parts that were merged into `path`; none for a part that is damaged or missing."""
    try:
        mark = read_metadata(path).get(COMPACTED_KEY, b"[]")
    except (pa.ArrowException, OSError, ValueError):
        return []
    return json.loads(mark)


def _warn_of_columns(directory: Path) -> None:
    """Warns about a folder named `column=value` in the path, which Hive partitioning reads as a
    column."""
    columns = {name for dataset in DATASETS.values() for name in dataset.schema.names}
    for folder in directory.absolute().parts:
        key, sign, _ = folder.partition("=")
        if sign and key in columns:
            log.warning(
                "other Parquet readers may take the folder %s for the column %s in the runs below "
                "it; pass them hive_partitioning=false, or rename the folder",
                folder,
                key,
            )
