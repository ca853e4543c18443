"""Which parts a run must have: a list beside them, without which none would miss a deleted one.

The list never names what the writer has taken away itself, whenever it is killed: a part is listed
after it was written, and struck off before it is removed. A part that is not listed is read all the
same. A run without a list (of version 0.1.0, or copied without hidden files) is read unverified.
"""

import json
import os
from collections.abc import Mapping, Set
from pathlib import Path

from nerve.files import write_atomically

MANIFEST_NAME = ".parts.json"


def read_manifest(directory: Path) -> dict[str, set[str]]:
    """The names of the parts that a run must have, by dataset; empty where no list can be read."""
    try:
        content = json.loads((directory / MANIFEST_NAME).read_bytes())
        return {str(name): set(map(str, parts)) for name, parts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_manifest(directory: Path, parts: Mapping[str, Set[str]]) -> None:
    """Replaces the list. Raises `StoreError` when the file system refuses.

    It need not survive a power cut: without it, parts are read as they are.
    """
    text = json.dumps({name: sorted(parts[name]) for name in sorted(parts)})
    write_atomically(
        directory / MANIFEST_NAME, lambda file: file.write(text.encode()), durable=False
    )


def missing_parts(directory: Path, dataset: str) -> list[Path]:
    """The parts of a dataset that are listed and not there, also while the run is written."""

    def missing() -> set[Path]:
        listed = read_manifest(directory).get(dataset, set())
        return {path for name in listed if not os.path.exists(path := directory / dataset / name)}

    gone = missing()
    # What the writer has just removed is not listed any more by now.
    return sorted(gone & missing()) if gone else []
