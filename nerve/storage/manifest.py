"""Which parts a run must have: a list beside them, without which none would miss a deleted one.

The list never names what the writer has taken away itself, whenever it is killed: a part is listed
after it was written, and struck off before it is removed. A part that is not listed is read all the
same. A run without a list (of version 0.1.0, or copied without hidden files) is read unverified.

The list is an object, the parts by dataset, and one line for each part that came later, so that a
part costs as much to list as the one before it. A line that was cut off ends it.
"""

import json
import os
from collections.abc import Collection, Mapping, Set
from pathlib import Path

from nerve.files import as_store_error, write_atomically

MANIFEST_NAME = ".parts.json"


def read_manifest(directory: Path) -> dict[str, set[str]]:
    """The names of the parts that a run must have, by dataset; empty where no list can be read."""
    parts: dict[str, set[str]] = {}
    try:
        for line in (directory / MANIFEST_NAME).read_bytes().splitlines():
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
