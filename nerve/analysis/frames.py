"""Helpers of the comparisons: checks of columns, joins with runs, means over layers, groups."""

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from nerve.errors import ConfigError
from nerve.storage.schema import METRIC_COLUMNS, Dataset

AT_STEP = ("tokens_seen", "train_loss", "val_loss")
"""Columns of `load_metrics` that all rows of a run and step share."""


def require_names(**lists: object) -> None:
    """Raises `ConfigError` for an argument that is not a list of names; the letters of a single
    string would be taken for names."""
    for key, names in lists.items():
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ConfigError(
                f"{key} must be a list of names; got {names!r}. Write {key}=[{names!r}]."
            )


def require_columns(frame: pd.DataFrame, names: Sequence[str], source: str) -> None:
    """Raises `ConfigError` with similar names unless `frame`, rows of `source`, has all `names`."""
    for name in names:
        if name not in frame.columns:
            columns = [str(column) for column in frame.columns]
            near = ", ".join(get_close_matches(name, columns, n=5)) or "none"
            raise ConfigError(
                f"The frame must have rows of {source} with the column {name}; it does not have "
                f"this column. Similar names: {near}."
            )


def require_factors(factors: Sequence[str], runs: pd.DataFrame, taken: Collection[str]) -> None:
    """Raises `ConfigError` for factors that `runs` does not have, or whose name is `taken`."""
    require_columns(runs, factors, "load_runs")
    require_free(factors, taken)


def require_free(factors: Sequence[str], taken: Collection[str]) -> None:
    """Raises `ConfigError` for factors whose name is `taken` by a column of the result, which would
    replace their values."""
    doubled = [name for name in dict.fromkeys(factors) if name in taken]
    if doubled:
        raise ConfigError(
            f"A factor must be a column that the result does not already have; got "
            f"{', '.join(doubled)}. Omit it, or rename the column."
        )


def require_joinable(factors: Sequence[str], runs: pd.DataFrame, dataset: Dataset) -> None:
    """Raises `ConfigError` with similar names for factors that `runs` does not have, or that the
    rows of the dataset already have."""
    own = {*dataset.schema.names, "n_damaged_parts"}
    own |= METRIC_COLUMNS if dataset.name == "metrics" else set()
    columns = [name for name in runs.columns if name not in own]
    for factor in factors:
        if factor in columns:
            continue
        parts = [name for name in columns if factor in (name.split(".")[0], name.split(".")[-1])]
        near = dict.fromkeys([*parts, *get_close_matches(factor, columns, n=5)])
        free, fix = "", f"Similar names: {', '.join(near) or 'none; see load_runs(path).columns'}."
        if factor in runs.columns:
            free = f" that {dataset.name} does not already have"
            fix = (
                "Omit it; a configuration value of that name can be a factor inside a group: "
                f'config={{"group": {{"{factor}": …}}}} gives group.{factor}.'
            )
        raise ConfigError(f"A factor must be a column of load_runs{free}; got {factor!r}. {fix}")


def rows_of(rows: pd.DataFrame, runs: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """The `rows` whose run is in `runs`, and the position of their run in `runs`."""
    ids = rows["run_id"]
    if isinstance(ids.dtype, pd.CategoricalDtype):  # each id is looked up once
        positions = pd.Index(runs["run_id"]).get_indexer(ids.cat.categories)[ids.cat.codes]
    else:
        positions = pd.Index(runs["run_id"]).get_indexer(pd.Index(ids))
    kept = positions >= 0
    return (rows, positions) if kept.all() else (rows[kept], positions[kept])


def join_runs(rows: pd.DataFrame, described: pd.DataFrame) -> pd.DataFrame:
    """`rows`, preceded by the columns of `described` for their run; rows of other runs are left
    out."""
    rows, positions = rows_of(rows, described)
    own = described.take(positions).reset_index(drop=True)
    return pd.concat([own, rows.drop(columns="run_id").reset_index(drop=True)], axis=1)


def at_last_step(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run at its last step."""
    last = rows.groupby("run_id", observed=True)["step"].transform("max")
    return rows[rows["step"] == last]


def average_layers(metrics: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row per run, FFN and step: the means of `names` over the layers where they were measured.

    Columns: `run_id, ffn, step, n_layers` (number of rows), `n_null` (rows with a status other than
    "ok"), `AT_STEP`, `names`.
    """
    keys = ["run_id", "ffn", "step"]
    rows = metrics[[*keys, *AT_STEP, *names]].assign(n_null=metrics["status"] != "ok")
    groups = rows.groupby(keys, sort=False, observed=True)
    columns = {
        "n_layers": groups.size(),
        "n_null": groups["n_null"].sum(),
        **{name: groups[name].first() for name in AT_STEP},
        **{name: groups[name].mean() for name in names},
    }
    return pd.DataFrame(columns).reset_index()


def group_points(points: pd.DataFrame, by: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """Groups points, without pooling different data or FFNs.

    A run without metrics has no FFN: it counts in `n_flagged` of every group with its values of
    `by`, and only has a separate group if there is no other.

    Returns:
        The group of each point, -1 for a run that only counts in other groups, and one row per
        group with `by, data, ffn, n_flagged`.
    """
    keys = [*dict.fromkeys([*by, "data", "ffn"])]
    ffn_known = points["ffn"].notna().to_numpy()
    part = number_rows(points, by)
    n_parts = part.max(initial=-1) + 1
    has_known = np.bincount(part[ffn_known], minlength=n_parts) > 0
    own = ffn_known | ~has_known[part]
    codes = np.full(len(points), -1)
    codes[own] = number_rows(points[own], keys)
    n_groups = codes.max(initial=-1) + 1

    flagged = (points["flag"] != "ok").to_numpy()
    n_flagged = np.bincount(codes[own & flagged], minlength=n_groups)
    first = np.zeros(n_groups, dtype=np.intp)
    first[codes[own][::-1]] = np.flatnonzero(own)[::-1]
    n_flagged += np.bincount(part[~own], minlength=n_parts)[part[first]]
    groups = points[keys].take(first).reset_index(drop=True)
    return codes, groups.assign(n_flagged=n_flagged)


def number_rows(frame: pd.DataFrame, by: Sequence[str]) -> np.ndarray:
    """Numbers the distinct values of the columns `by` in the order of their appearance."""
    if not len(by):
        return np.zeros(len(frame), dtype=np.intp)
    keys = [_distinct(frame[name]) for name in by]
    return frame.groupby(keys, sort=False, dropna=False, observed=True).ngroup().to_numpy()


def _distinct(values: pd.Series) -> pd.Series:
    """Values that pandas distinguishes: in its tables true equals 1, which is another level."""
    if values.dtype != object or not infer_dtype(values, skipna=True).startswith("mixed"):
        return values
    return values.map(lambda value: (value,) if isinstance(value, bool) else value)


def count_distinct(codes: np.ndarray, values: pd.Series, n_groups: int) -> np.ndarray:
    """The number of distinct values in each group, without missing ones; -1 codes no group."""
    kept = pd.Series(values.to_numpy()[codes >= 0]).groupby(codes[codes >= 0])
    return kept.nunique().reindex(range(n_groups), fill_value=0).to_numpy()


def interleave(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The first rows of all tables, then the second rows, and so on."""
    return pd.concat(tables).sort_index(kind="stable").reset_index(drop=True)
