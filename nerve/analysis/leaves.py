"""The columns of `load_runs` that are values of a configuration, where they say something about the
result."""

from dataclasses import fields

import numpy as np
import pandas as pd

from nerve.storage.columns import CONFIGURED, RECORDED_GROUPS
from nerve.storage.identity import EXCLUDED, ORIGINAL_GROUPS
from nerve.storage.record import RunRecord

RECORDED = {entry.name for entry in fields(RunRecord)} | {"design_id"}
DIGESTS = ("weights", "batches", "masks")
"""Hashes of tensors in the configuration of a measured model, which differ between any two runs."""

_MEASURED = ("measure", "probe")
"""Groups of the configuration that only a measured model has."""


def leaves_of(runs: pd.DataFrame) -> dict[str, pd.Series]:
    """The values of each leaf but the seed and `_target_` keys, by its column.

    What says nothing about the result is missing: the `EXCLUDED` keys in rows of nerve-run, and the
    `DIGESTS` in those of measured models. In the configuration of any other run, the same names may
    mean something else.
    """
    is_of_nerve_run = np.all([_has(runs, group) for group in ORIGINAL_GROUPS], axis=0)
    is_measured = np.any([_has(runs, group) for group in _MEASURED], axis=0)
    leaves = {str(name): runs[name] for name in runs.columns if _is_leaf(str(name))}
    for name, values in leaves.items():
        if name in DIGESTS:
            leaves[name] = values.mask(is_measured)
        elif any(name == other or name.startswith(f"{other}.") for other in EXCLUDED):
            leaves[name] = values.mask(is_of_nerve_run)
    return leaves


def _is_leaf(name: str) -> bool:
    parts = name.split(".")
    return (
        name not in RECORDED
        and name != f"{CONFIGURED}seed"
        and parts[0] not in RECORDED_GROUPS
        and not any(part.startswith("_") for part in parts)
    )


def _has(runs: pd.DataFrame, group: str) -> pd.Series:
    """Which rows have a value in this group of the configuration."""
    return runs.filter(regex=rf"^{group}\.").notna().any(axis=1)
