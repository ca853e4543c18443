"""The columns that `load_metrics` makes of the stored ones, one function each."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from nerve.metric_names import SITES, STORED
from nerve.outliers import outliers

Columns = Mapping[str, np.ndarray]

_OF_A_SITE: dict[str, Callable[[Columns, str], np.ndarray]] = {
    "exp_se_{site}": lambda rows, site: np.exp(rows[f"se_{site}"]),
    # One feature has ln D = 0 and no spread that could be normalized.
    "se_{site}_normalized": lambda rows, site: (
        rows[f"se_{site}"] / np.log(np.where(rows["d_ff"] > 1, rows["d_ff"], np.nan))
    ),
    "pr_{site}_fraction": lambda rows, site: rows[f"pr_{site}"] / rows["d_ff"],
    "rank_limit_{site}": lambda rows, site: _rank_limit(rows, site),
}
_OF_BOTH: dict[str, Callable[[Columns], np.ndarray]] = {
    "pr_gain": lambda rows: rows["pr_post"] / rows["pr_pre"],
    "delta_eee": lambda rows: rows["eee_post"] - rows["eee_pre"],
}


def derived_columns(rows: Columns) -> dict[str, np.ndarray]:
    """Every derived column of the catalogue, from arrays of the stored ones."""
    with np.errstate(all="ignore"):
        of_sites = {
            column.format(site=site): derive(rows, site)
            for column, derive in _OF_A_SITE.items()
            for site in SITES
        }
        return of_sites | {column: derive(rows) for column, derive in _OF_BOTH.items()}


def with_derived(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of metrics with every derived column of the catalogue, and `outliers`."""
    # A column of nothing but None, as rows have it that were never stored, is one of numbers.
    none = [name for name in STORED if name in rows and rows[name].dtype == object]
    if none:
        rows = rows.astype(dict.fromkeys(none, float))
    columns: Any = {str(name): values.to_numpy() for name, values in rows.items()}
    return rows.assign(**derived_columns(columns), outliers=outliers(rows))


def _rank_limit(rows: Columns, site: str) -> np.ndarray:
    """Nothing that passes through `d_in` numbers has a higher rank before the nonlinearity."""
    width = np.minimum(rows["d_in"], rows["d_ff"]) if site == "pre" else rows["d_ff"]
    return np.minimum(width, rows["n_samples"] - 1).astype(rows["d_ff"].dtype)
