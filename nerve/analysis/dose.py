"""Dose and response: what the loss does when a metric is moved, against what designs predict."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from nerve.analysis.compare import final_metrics
from nerve.analysis.frames import group_points, require_columns
from nerve.analysis.statistics import Array, Pairs, fit_line, student_t
from nerve.config import require
from nerve.errors import ConfigError
from nerve.metric_names import CORRELATED, metric_of


def dose_response(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    *,
    dose: str,
    by: Sequence[str] = (),
    names: Sequence[str] = CORRELATED,
    reference: float | None = None,
    designs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """The final metrics and loss of runs that differ in one number, the dose, and in their seed.

    One row a group (values of `by`, `data` and `ffn`), metric and dose. A metric that is a ratio
    (PR, exp(SE), PR gain) is taken as its natural logarithm. Flagged runs are left out.

    Runs are paired by seed: value = dose + seed + error, by least squares, with the error pooled
    over all doses; intervals are Student's at 95%, with `df` degrees of freedom. The slope of the
    loss over the metric is that of loss = seed + slope · metric + error: what of the loss moves
    with the metric when the dose moves both. What designs predict is the slope of the least squares
    line through them, a point a design.

    Columns:

    - those of `by`, `data, ffn, metric`, and the dose under its own name
    - `n_seeds` of this dose; `n_flagged`: runs of the group that were left out
    - `value`: the mean of the metric (its logarithm); `change, change_low, change_high` against the
      reference dose
    - `val_loss`: its mean; `loss_change, loss_change_low, loss_change_high`
    - `df` of these; `predicted_loss_change`: the predicted slope times `change`
    - `slope, slope_low, slope_high`, observed, nats of loss a unit of the metric;
      `predicted_slope, predicted_slope_low, predicted_slope_high`; `n_designs` behind it; the same
      in all rows of a metric

    What cannot be told is missing: changes of a dose that shares no seed with the reference, with
    one seed all intervals, without `designs` what they predict.

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        dose: a column of `runs` with numbers, such as `"regularizer.weight"`.
        by: columns of `runs` that tell other designs apart, such as `"activation.name"`.
        names: the metrics, columns of `metrics`.
        reference: the dose that others are held against; None for 0 where that is one, else the
            lowest.
        designs: rows of `average_seeds`, of designs that were not dosed and have the same data;
            those that were dosed are passed over.

    Raises:
        ConfigError: for a name that is not a column, a dose without numbers, a reference that no
            run has, or runs of equal dose and seed that differ in something else.
    """
    points = final_metrics(metrics, runs, factors=[dose, *by])
    require_columns(points, names, "final_metrics")
    require(
        is_numeric_dtype(points[dose]),
        f"A dose is a number; {dose} has values such as {points[dose].iloc[0]!r}. Take another "
        "column, or runs that all have it.",
    )
    if reference is None:
        reference = 0.0 if (points[dose] == 0).any() else float(points[dose].min())
    require(
        bool((points[dose] == reference).any()),
        f"The reference is one of the doses, {', '.join(map(str, sorted(set(points[dose]))))}; got "
        f"{reference}.",
    )
    codes, groups = group_points(points, by)
    ok = (points["flag"] == "ok").to_numpy() & points[dose].notna().to_numpy()
    rows: list[dict[str, Any]] = []
    for group, values in enumerate(groups.to_dict("records")):
        about = {str(key): value for key, value in values.items()}
        own = points[ok & (codes == group)]
        _require_pairs(own, dose, by)
        for name in names:
            said = {**about, "metric": name}
            predicted = _predicted(designs, points["design_id"], about, name)
            rows += (
                {**said, dose: value, **response, **predicted}
                for value, response in _responses(own, dose, name, reference, predicted)
            )
    frame = pd.DataFrame(rows, columns=_columns(by, dose))
    return frame.astype({"n_seeds": int, "n_flagged": int, "df": int, "n_designs": int})


def _columns(by: Sequence[str], dose: str) -> list[str]:
    def with_interval(name: str) -> list[str]:
        return [name, f"{name}_low", f"{name}_high"]

    return [
        *dict.fromkeys([*by, "data", "ffn", "metric", dose]),
        *("n_seeds", "n_flagged", "value"),
        *with_interval("change"),
        "val_loss",
        *with_interval("loss_change"),
        *("df", "predicted_loss_change"),
        *with_interval("slope"),
        *with_interval("predicted_slope"),
        "n_designs",
    ]


def _require_pairs(points: pd.DataFrame, dose: str, by: Sequence[str]) -> None:
    doubled = points.duplicated([dose, "seed"], keep=False)
    if doubled.any():
        first = points[doubled].iloc[0]
        raise ConfigError(
            f"Runs of one group differ in {dose} and seed alone; several have {dose}={first[dose]} "
            f"and seed={first['seed']}, such as {', '.join(points[doubled]['run_id'][:2])}. Name "
            f"what else varies in by (now {', '.join(by) or 'empty'}), or leave runs out."
        )


def _responses(
    points: pd.DataFrame,
    dose: str,
    name: str,
    reference: float,
    predicted: dict[str, float],
) -> Iterator[tuple[float, dict[str, float]]]:
    """Each dose of a group, and the columns of its row that are observed."""
    values, losses = _scaled(points, name), points["val_loss"].to_numpy(float)
    there = np.isfinite(values) & np.isfinite(losses)
    values, losses, points = values[there], losses[there], points[there]
    doses, dose_codes = np.unique(points[dose].to_numpy(float), return_inverse=True)
    seeds = np.unique(points["seed"].to_numpy(float), return_inverse=True)[1]
    slope = _slope(seeds, values, losses)
    of_value = _changes(dose_codes, seeds, values, doses == reference)
    of_loss = _changes(dose_codes, seeds, losses, doses == reference)
    n_seeds = np.bincount(dose_codes, minlength=len(doses))
    for i, value in enumerate(doses):
        mine = dose_codes == i
        yield (
            value,
            {
                "n_seeds": n_seeds[i],
                "value": values[mine].mean(),
                **_interval("change", of_value[0][i], of_value[1][i]),
                "val_loss": losses[mine].mean(),
                **_interval("loss_change", of_loss[0][i], of_loss[1][i]),
                "df": of_loss[2],
                "predicted_loss_change": predicted["predicted_slope"] * of_value[0][i],
                **slope,
            },
        )


def _scaled(points: pd.DataFrame, name: str) -> Array:
    """The metric, or its logarithm where it is a ratio."""
    values = points[name].to_numpy(float, na_value=np.nan)
    metric = metric_of(name)
    if metric is None or not metric.is_ratio:
        return values
    return np.log(values, out=np.full(len(values), np.nan), where=values > 0)


def _changes(
    doses: np.ndarray, seeds: np.ndarray, values: Array, is_reference: np.ndarray
) -> tuple[Array, Array, int]:
    """Of value = dose + seed + error: each dose less the reference, half of its interval, and the
    degrees of freedom; missing where no seeds connect the two."""
    n_doses = len(is_reference)
    n_seeds = int(seeds.max(initial=-1)) + 1
    design = np.concatenate([np.eye(n_doses)[doses], np.eye(n_seeds)[seeds]], axis=1)
    contrasts = np.zeros((n_doses, n_doses + n_seeds))
    contrasts[:, :n_doses] = np.eye(n_doses) - is_reference
    inverse = np.linalg.pinv(design.T @ design)
    effects = inverse @ design.T @ values
    free = len(values) - int(np.linalg.matrix_rank(design)) if len(values) else 0
    residuals = values - design @ effects
    variance = residuals @ residuals / free if free else np.nan
    spread = np.sqrt(variance * np.einsum("ij,jk,ik->i", contrasts, inverse, contrasts))
    half = student_t(np.array([free]))[0] * spread
    told = np.isclose(contrasts @ inverse @ design.T @ design, contrasts, atol=1e-8).all(axis=1)
    told &= is_reference.any()
    changes = np.where(told, contrasts @ effects, np.nan)
    changes[is_reference] = 0.0
    return changes, np.where(told & ~is_reference, half, np.nan), free


def _slope(seeds: np.ndarray, values: Array, losses: Array) -> dict[str, float]:
    """That of loss = seed + slope · value + error, and its interval."""
    n_seeds = int(seeds.max(initial=-1)) + 1
    pairs = Pairs.of(seeds, values, losses, n_seeds)
    xx, yy, xy = (moments.sum() for moments in pairs.moments)
    if not xx > 0:
        return _interval("slope", np.nan, np.nan)
    free = int(pairs.n.sum()) - n_seeds - 1
    unexplained = max(yy - xy * xy / xx, 0.0)
    half = student_t(np.array([free]))[0] * np.sqrt(unexplained / free / xx) if free > 0 else np.nan
    return _interval("slope", xy / xx, half)


def _predicted(
    designs: pd.DataFrame | None, dosed: pd.Series, about: dict[str, Any], name: str
) -> dict[str, float]:
    """The slope of the loss over the metric across designs of the same data and FFN."""
    nothing = {**_interval("predicted_slope", np.nan, np.nan), "n_designs": 0}
    if designs is None:
        return nothing
    require_columns(designs, ["design_id", "flag", "n_seeds", "val_loss", name], "average_seeds")
    mine = designs[
        (designs["flag"] == "ok")
        & ~designs["design_id"].isin(dosed)
        & (designs["ffn"] == about["ffn"])
        & (designs["data"].fillna("") == ("" if pd.isna(about["data"]) else about["data"]))
    ]
    losses = mine["val_loss"].to_numpy(float, na_value=np.nan)
    pairs = Pairs.of(np.zeros(len(mine), dtype=np.int64), _scaled(mine, name), losses, 1)
    line = fit_line(pairs)
    slope, high = float(line.slope[0]), float(line.high[0])
    return {**_interval("predicted_slope", slope, high - slope), "n_designs": int(pairs.n[0])}


def _interval(name: str, value: float, half: float) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
