"""Dose and response: how the loss changes when a metric is changed by an intervention, compared
with the prediction from designs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from nerve.analysis.compare import final_metrics
from nerve.analysis.estimate import LeastSquares
from nerve.analysis.frames import group_points, require_columns, require_free, require_names
from nerve.analysis.paired import on_scale
from nerve.analysis.paired_fit import Effects, paired_by_seed
from nerve.analysis.statistics import Pairs, fit_line
from nerve.config import require
from nerve.errors import ConfigError
from nerve.metric_names import CORRELATED


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

    One row per group (values of `by`, `data` and `ffn`), metric and dose. A metric that is a ratio
    (PR, exp(SE), PR gain) is replaced by its natural logarithm. Flagged runs are left out.

    Runs are paired by seed: value = dose + seed + error, by least squares, with the error pooled
    over all doses; intervals are Student's at 95%, with `df` degrees of freedom. The slope of the
    loss over the metric is that of loss = seed + slope · metric + error: how the loss changes with
    the metric when the dose changes both. The prediction from designs is the slope of the least
    squares line through them, one point per design.

    Columns:

    - those of `by`, `data, ffn, metric`, and the dose under its own name
    - `n_seeds` of this dose; `n_flagged`: runs of the group that were left out
    - `value`: the mean of the metric (its logarithm); `change, change_low, change_high` relative to
      the reference dose
    - `val_loss`: its mean; `loss_change, loss_change_low, loss_change_high`
    - `df` of these; `predicted_loss_change`: the predicted slope times `change`
    - `slope, slope_low, slope_high`, observed, nats of loss per unit of the metric;
      `predicted_slope, predicted_slope_low, predicted_slope_high`; `n_designs` used for it; the
      same in all rows of a metric

    Values that cannot be estimated are missing: changes of a dose that shares no seed with the
    reference, all intervals with one seed, the predictions without `designs`.

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        dose: a numeric column of `runs`, such as `"regularizer.weight"`.
        by: columns of `runs` that distinguish other designs, such as `"activation.name"`.
        names: the metrics, columns of `metrics`.
        reference: the dose that others are compared with; None for 0 if there is such a dose, else
            the lowest.
        designs: rows of `average_seeds`, of designs without a dose on the same data; those with a
            dose are ignored.

    Raises:
        ConfigError: for a name that is not a column, a dose without numbers, a reference that no
            run has, or runs with the same dose and seed that differ in something else.
    """
    require_names(by=by, names=names)
    columns = _columns(by, dose)
    require_free([dose, *by], [name for name, n in Counter(columns).items() if n > 1] + ["metric"])
    points = final_metrics(metrics, runs, factors=[dose, *by])
    require_columns(points, names, "final_metrics")
    doses = points[dose].dropna()
    require(
        is_numeric_dtype(points[dose]) and len(doses) > 0,
        f"A dose must be a number; {dose} has {_some(doses)}. Choose another column, or runs that "
        "all have it.",
    )
    if reference is None:
        reference = 0.0 if (doses == 0).any() else float(doses.min())
    require(
        bool((doses == reference).any()),
        f"The reference must be one of the doses, {', '.join(map(str, sorted(set(doses))))}; got "
        f"{reference}.",
    )
    codes, groups = group_points(points, by)
    ok = ((points["flag"] == "ok") & points[[dose, "seed"]].notna().all(axis=1)).to_numpy()
    rows: list[dict[str, Any]] = []
    for group, values in enumerate(groups.to_dict("records")):
        about = {str(key): value for key, value in values.items()}
        own = points[ok & (codes == group)]
        _require_pairs(own, dose, by)
        for name in names:
            labels = {**about, "metric": name}
            predicted = _predicted(designs, points["design_id"], about, name)
            rows += (
                {**labels, dose: value, **response, **predicted}
                for value, response in _responses(own, dose, name, reference, predicted)
            )
    frame = pd.DataFrame(rows, columns=columns)
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


def _some(values: pd.Series) -> str:
    return f"values such as {values.iloc[0]!r}" if len(values) else "no value in these runs"


def _require_pairs(points: pd.DataFrame, dose: str, by: Sequence[str]) -> None:
    doubled = points.duplicated([dose, "seed"], keep=False)
    if doubled.any():
        first = points[doubled].iloc[0]
        raise ConfigError(
            f"Runs of one group may only differ in {dose} and seed; several have "
            f"{dose}={first[dose]} and seed={first['seed']}, such as "
            f"{', '.join(points[doubled]['run_id'][:2])}. Add the other columns that vary to by "
            f"(now {', '.join(by) or 'empty'}), or leave runs out."
        )


def _responses(
    points: pd.DataFrame,
    dose: str,
    name: str,
    reference: float,
    predicted: dict[str, float],
) -> Iterator[tuple[float, dict[str, float]]]:
    """Each dose of a group, and the observed columns of its row."""
    values, _ = on_scale(name, points[name].to_numpy(float, na_value=np.nan))
    losses = points["val_loss"].to_numpy(float)
    kept = np.isfinite(values) & np.isfinite(losses)
    if not kept.any():
        return
    values, losses, points = values[kept], losses[kept], points[kept]
    given = points[dose].to_numpy(float)
    seeds, _ = pd.factorize(points["seed"], sort=True)  # a seed may have more than 64 bits
    fit = paired_by_seed(given, seeds)
    doses = np.unique(given)  # in the order of fit.designs
    of_seeds = [seeds == seed for seed in np.unique(seeds)]
    line = LeastSquares(np.stack([values, *of_seeds], axis=1))
    slope = _interval("slope", *line.effect(losses, np.eye(line.matrix.shape[1])[0])[:3])
    changes: list[Effects] = []
    if reference in doses:
        start = np.full(len(doses), np.searchsorted(doses, reference))
        changes = [fit.differences(each, start, np.arange(len(doses))) for each in (values, losses)]
    for i, value in enumerate(doses):
        change, loss_change = [(each.effect[i], each.low[i], each.high[i]) for each in changes] or [
            (np.nan, np.nan, np.nan)
        ] * 2
        mine = given == value
        yield (
            value,
            {
                "n_seeds": mine.sum(),
                "value": values[mine].mean(),
                **_interval("change", *change),
                "val_loss": losses[mine].mean(),
                **_interval("loss_change", *loss_change),
                "df": fit.df,
                "predicted_loss_change": predicted["predicted_slope"] * change[0],
                **slope,
            },
        )


def _predicted(
    designs: pd.DataFrame | None, dosed: pd.Series, about: dict[str, Any], name: str
) -> dict[str, float]:
    """The slope of the loss over the metric across designs with the same data and FFN."""
    if designs is None:
        return {**_interval("predicted_slope", np.nan, np.nan, np.nan), "n_designs": 0}
    require_columns(designs, ["design_id", "flag", "n_seeds", "val_loss", name], "average_seeds")
    mine = designs[
        (designs["flag"] == "ok")
        & ~designs["design_id"].isin(dosed)
        & (designs["ffn"] == about["ffn"])
        & (designs["data"].fillna("") == ("" if pd.isna(about["data"]) else about["data"]))
    ]
    losses = mine["val_loss"].to_numpy(float, na_value=np.nan)
    values, _ = on_scale(name, mine[name].to_numpy(float, na_value=np.nan))
    pairs = Pairs.of(np.zeros(len(mine), dtype=np.int64), values, losses, 1)
    line = fit_line(pairs)
    slope, low, high = (float(each[0]) for each in (line.slope, line.low, line.high))
    return {**_interval("predicted_slope", slope, low, high), "n_designs": int(pairs.n[0])}


def _interval(name: str, value: float, low: float, high: float) -> dict[str, float]:
    return {name: value, f"{name}_low": low, f"{name}_high": high}
