"""The columns that `load_metrics` makes of the stored ones, one function each."""

from collections.abc import Callable

import numpy as np
import pandas as pd

from nerve.metric_names import SITES, STORED
from nerve.outliers import outliers

Values = pd.Series | np.ndarray

_OF_A_SITE: dict[str, Callable[[pd.DataFrame, str], Values]] = {
    "exp_se_{site}": lambda rows, site: np.exp(rows[f"se_{site}"]),
    # One feature has ln D = 0 and no spread that could be normalized.
    "se_{site}_normalized": lambda rows, site: (
        rows[f"se_{site}"] / np.log(rows["d_ff"].where(rows["d_ff"] > 1))
    ),
    "pr_{site}_fraction": lambda rows, site: rows[f"pr_{site}"] / rows["d_ff"],
    "rank_limit_{site}": lambda rows, site: _rank_limit(rows, site),
}
_OF_BOTH: dict[str, Callable[[pd.DataFrame], Values]] = {
    "pr_gain": lambda rows: rows["pr_post"] / rows["pr_pre"],
    "delta_eee": lambda rows: rows["eee_post"] - rows["eee_pre"],
}


def with_derived(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of metrics with every derived column of the catalogue, and `outliers`."""
    # A column of nothing but None, as rows have it that were never stored, is one of numbers.
    none = [name for name in STORED if name in rows and rows[name].dtype == object]
    if none:
        rows = rows.astype(dict.fromkeys(none, float))
    of_sites = {
        column.format(site=site): derive(rows, site)
        for column, derive in _OF_A_SITE.items()
        for site in SITES
    }
    of_both = {column: derive(rows) for column, derive in _OF_BOTH.items()}
    return rows.assign(**of_sites, **of_both, outliers=outliers(rows))


def _rank_limit(rows: pd.DataFrame, site: str) -> Values:
    """Nothing that passes through `d_in` numbers has a higher rank before the nonlinearity."""
    width = np.minimum(rows["d_in"], rows["d_ff"]) if site == "pre" else rows["d_ff"]
    return np.minimum(width, rows["n_samples"] - 1).astype(rows["d_ff"].to_numpy().dtype)
