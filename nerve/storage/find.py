"""Finds the run directories below a path and loads their records, one per run."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nerve.errors import StoreError, warn_caller
from nerve.storage.record import RunRecord
from nerve.storage.record_file import (
    RECORD_NAME,
    DamagedRecordError,
    DamagedRecordWarning,
    left_by_a_run,
)

OF_A_RUN = ("checkpoints", "groups", "metrics", "scalars", "spectra")
"""Folders of a run directory that contain no other run."""

AnyPath = str | os.PathLike[str]


class IncompleteWarning(UserWarning):
    """Something under the path was left out of a frame; the message names it and gives the
    reason."""


class FingerprintWarning(UserWarning):
    """Runs that are loaded together used different data, tokenizers or held-out sets."""


def find_runs(path: AnyPath | Iterable[AnyPath]) -> list[Path]:
    """The run directories at or below `path`, each once, in the order of their names, including
    those inside another run directory.

    Args:
        path: a run, a sweep, a whole tree of outputs, or several of these. Symbolic links are
            followed, and loops are detected. Hidden directories are skipped.

    Raises:
        StoreError: if a path does not exist, or no run is found.
    """
    roots = [Path(path)] if isinstance(path, str | os.PathLike) else [Path(root) for root in path]
    seen: set[tuple[int, int]] = set()
    runs: list[Path] = []
    for root in roots:
        if not os.path.isdir(root):  # also False without permission to look at it
            raise StoreError(
                f"Runs are read from directories; there is none at {root}. Pass the directory of "
                "a run, of a sweep, or of all outputs."
            )
        runs.extend(_walk(root, seen))
    if not runs:
        raise StoreError(
            f"A run directory contains {RECORD_NAME}; none was found under "
            f"{', '.join(map(str, roots)) or 'no path'}. Pass the directory to which runs were "
            "written."
        )
    return runs


def load_records(
    path: AnyPath | Iterable[AnyPath], read: Callable[[RunRecord], object] = lambda record: None
) -> list[RunRecord]:
    """The records of the runs under `path`.

    `read` is called with each record as soon as it is read, including copies that are omitted
    later. It may remove what would take too much memory for thousands of runs.

    If a run id is found twice (a copied directory), the copy that got further is used. Warnings
    name the omitted copies, damaged records, records of a newer nerve and differing fingerprints.

    Raises:
        StoreError: if there is no run, or none whose record can be read.
    """
    records: dict[str, RunRecord] = {}
    directories = find_runs(path)
    for directory in directories:
        try:
            record = RunRecord.load(directory)
        except DamagedRecordError as error:
            warn_caller(f"Left out: {error}", DamagedRecordWarning)
            continue
        except StoreError as error:
            warn_caller(f"Left out: {error}", IncompleteWarning)
            continue
        read(record)
        other = records.get(record.run_id)
        if other is not None:
            record, other = sorted([record, other], key=_progress, reverse=True)
            same = "copies of one run" if record.started == other.started else "two runs of one id"
            warn_caller(
                f"Run {record.run_id} is in two directories ({same}): {record.directory} is used, "
                f"{other.directory} is left out. Move one of them away.",
                IncompleteWarning,
            )
        records[record.run_id] = record
    if not records:
        raise StoreError(
            f"None of the {len(directories)} runs found has a readable {RECORD_NAME}; the first is "
            f"{directories[0]}. Restore it from a copy."
        )
    warn_fingerprints(list(records.values()))
    return list(records.values())


def warn_fingerprints(records: list[RunRecord]) -> None:
    """Warns once for each of corpus, tokenizer and held-out set that differs between runs."""
    for name in sorted({name for record in records for name in record.fingerprints}):
        runs: dict[str, list[str]] = {}
        for record in records:
            if name in record.fingerprints:
                runs.setdefault(str(record.fingerprints[name]), []).append(record.run_id)
        if len(runs) > 1:
            groups = "; ".join(f"{value[:12]}: {listed(ids)}" for value, ids in runs.items())
            fix = (
                " Runs that differ in width need one monitor.n_tokens." if name == "heldout" else ""
            )
            warn_caller(
                f"These runs differ in fingerprints.{name}, so their losses are not comparable "
                f"({groups}). Compare only runs of the same group.{fix}",
                FingerprintWarning,
            )


def listed(names: list[str]) -> str:
    """The first few names, and the number of all if there are more."""
    return ", ".join(names[:4]) + (f", … ({len(names)} runs)" if len(names) > 4 else "")


def _walk(directory: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    try:
        status = directory.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(directory) as entries:
            children = {entry.name: _is_directory(entry) for entry in entries}
    except OSError as error:  # no permission, or removed since its parent was listed
        warn_caller(f"Left out: {directory} cannot be listed: {error}", IncompleteWarning)
        return
    if RECORD_NAME in children or left_by_a_run(directory):
        yield directory
        children = {name: children[name] for name in children if name not in OF_A_RUN}
    for name in sorted(children):
        if children[name] and not name.startswith("."):
            yield from _walk(directory / name, seen)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        warn_caller(f"Left out: {entry.path} cannot be followed: {error}", IncompleteWarning)
        return False


def _progress(record: RunRecord) -> tuple[int, str]:
    return record.step, record.heartbeat
