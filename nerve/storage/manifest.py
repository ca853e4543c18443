"""The list of the parts that a run must have, because otherwise a deleted part would go unnoticed.

It never names a part that the writer itself removed, whenever the writer is killed: a part is added
to the list after it is written, and deleted from the list before it is removed. A part that is not
listed is still read. A run without a list (of version 0.1.0, or copied without hidden files) is
read unverified.

The list consists of an object with the parts of each dataset, and one line for each part added
later, so that adding a part always costs the same. A truncated line ends the list.
"""

import json
import os
from collections.abc import Collection, Mapping, Set
from pathlib import Path

from nerve.files import as_store_error, write_atomically

MANIFEST_NAME = ".parts.json"


def read_manifest(directory: Path) -> dict[str, set[str]]:
    """The names of the parts that a run must have, by dataset; empty if no list can be read."""
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
    """Replaces the list. Raises `StoreError` if it cannot be written.

    It need not survive a power failure: without it, parts are read unverified.
    """
    text = json.dumps({name: sorted(parts[name]) for name in sorted(parts)}) + "\n"
    write_atomically(
        directory / MANIFEST_NAME, lambda file: file.write(text.encode()), durable=False
    )


def add_to_manifest(directory: Path, dataset: str, parts: Collection[str]) -> None:
    """Adds parts to the list. Raises `StoreError` if it cannot be written."""
    path = directory / MANIFEST_NAME
    line = json.dumps([dataset, sorted(parts)]) + "\n"
    with as_store_error(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode())


def missing_parts(directory: Path, dataset: str) -> list[Path]:
    """The parts of a dataset that are listed but do not exist, even while the run is being
    written."""

    folder = str(directory / dataset)

    def missing() -> set[Path]:
        listed = read_manifest(directory).get(dataset, set())
        return {Path(path) for name in listed if not os.path.exists(path := f"{folder}/{name}")}

    gone = missing()
    # Parts that the writer has just removed are no longer listed by now.
    return sorted(gone & missing()) if gone else []
