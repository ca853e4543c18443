"""Hides packages that no run needs, from an interpreter that finds this folder on PYTHONPATH.

As with a user who does not have them. torchmetrics, and so Lightning, imports each of them that it
finds, which takes two of the five seconds that a run needs to start. And what is imported stays: it
is looked through for garbage less often and not again at the end, which takes another.
"""

import atexit
import gc
import sys
from importlib import metadata
from typing import Any

HIDDEN = ("matplotlib", "scipy", "transformers")

gc.set_threshold(100_000)
atexit.register(gc.freeze)

_version = metadata.version


def version(name: str) -> str:
    if name in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return _version(name)


class Hidden:
    """Finds none of them."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> None:
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


metadata.version = version
sys.meta_path.insert(0, Hidden)


def reveal() -> None:
    """Hides nothing any more, for what needs one of them in a process that was forked."""
    metadata.version = _version
    sys.meta_path.remove(Hidden)
