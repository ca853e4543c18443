"""Stored notebooks."""

import re
from pathlib import Path
from typing import Any

import nbformat

LARGEST = 600_000
"""Bytes of one that a repository takes."""


def stored_cells(path: Path) -> dict[str, Any]:
    """The cells as they are committed, by id."""
    return {cell["id"]: cell for cell in nbformat.read(path, as_version=4).cells}


def assert_small_and_without_places(path: Path) -> None:
    """An executed notebook must be small and must not name a path of the machine that wrote it."""
    assert path.stat().st_size < LARGEST
    for cell in stored_cells(path).values():
        texts = [cell.source]
        for output in cell.get("outputs", []):
            texts += [text for form, text in output.data.items() if form.startswith("text/")]
        for text in texts:
            assert not re.search(r"""(^|[\s"'=>(])(/\w|[A-Z]:\\)""", text), text
