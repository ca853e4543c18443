"""Do the metrics follow the loss? Correlations within each run, and across runs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nerve.analysis.flags import describe_runs, flag_runs
from nerve.analysis.frames import (
    average_layers,
    count_distinct,
    group_points,
    interleave,
    join_runs,
    number_rows,
    require_columns,
    rows_of,
)
from nerve.analysis.statistics import Pairs, correlation, pearson_interval, spearman_interval
from nerve.metric_names import CORRELATED

WINDOWS = ("all", "after_warmup", "differences")
"""The steps that a correlation within a run is taken over."""

DEFAULT_WARMUP = 0.05
"""Fraction of the steps left out as warm-up of a run whose configuration names none."""


def correlate_within_runs(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    factors: Sequence[str] = (),
    *,
    by_layer: bool = False,
    names: Sequence[str] = CORRELATED,
) -> pd.DataFrame:
    """Correlation of each metric with the validation loss over the measured steps of each run.

    One row per run, FFN, (layer,) metric and window. One number alone misleads: step 0 often lies
    far from all others, and two series that both drift correlate whatever they are. Windows:

    - `all`: all measured steps
    - `after_warmup`: steps ≥ max(1, round(warmup · max_steps)), from `optimizer.schedule.warmup`
      and `trainer.max_steps` of the run; where these are missing, `DEFAULT_WARMUP` of its last
      measured step
    - `differences`: of the changes from one measured step to the next, both `after_warmup`, for a
      change from step 0 would outweigh all others

    The points of one run are not independent, so no interval is given.

    Columns: `run_id, config_id, design_id, sweep, seed`, the `factors`, `data, heldout, flag, ffn`,
    `layer` (with `by_layer`), `metric, window, first_step` (of the window), `n` (pairs), `pearson,
    spearman`, both in [-1, 1], missing for n < 3 and where metric or loss does not vary.

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        factors: columns of `runs` to keep.
        by_layer: each layer's metric instead of the mean over layers.
        names: the metrics, columns of `metrics`.

    Raises:
        ConfigError: for a name or factor that is not a column, or a factor that the frame has.
    """
    keys = ["run_id", "ffn", *(["layer"] if by_layer else [])]
    require_columns(metrics, [*keys, "step", "val_loss", *names], "load_metrics")
    taken = ["ffn", "layer", "metric", "window", "first_step", "n", "pearson", "spearman"]
    described = describe_runs(flag_runs(metrics, runs), runs, factors, taken)
    rows, _ = rows_of(metrics, runs)
    if not by_layer:
        rows = average_layers(rows, names)
    codes = number_rows(rows, keys)
    order = np.lexsort((rows["step"], codes))
    rows, codes = rows.take(order), codes[order]
    series = rows.drop_duplicates(keys)[[*keys, "step"]].reset_index(drop=True)
    n_series = len(series)

    warmed_up = _warmup_ends(rows, series, runs)
    late = np.where(rows["step"].to_numpy() >= warmed_up[codes], codes, -1)
    loss = rows["val_loss"].to_numpy(float)
    loss_changes = _changes(late, loss)
    results = []
    for name in names:
        metric = rows[name].to_numpy(float)
        changes = (late, _changes(late, metric), loss_changes)
        for values in ((codes, metric, loss), (late, metric, loss), changes):
            pairs = Pairs.of(*values, n_series)
            results.append((pairs.n, correlation(pairs), correlation(pairs.ranked())))
    starts = np.stack([series["step"], warmed_up, warmed_up])
    table = series.loc[series.index.repeat(len(results)), keys].reset_index(drop=True)
    table["metric"] = np.tile(np.repeat(np.array(names, dtype=object), len(WINDOWS)), n_series)
    table["window"] = np.tile(np.array(WINDOWS, dtype=object), n_series * len(names))
    table["first_step"] = np.tile(starts, (len(names), 1)).T.ravel()
    for name, values in zip(("n", "pearson", "spearman"), zip(*results, strict=True), strict=True):
        table[name] = np.stack(values).T.ravel()
    return join_runs(table, described)


def correlate_across_runs(
    points: pd.DataFrame,
    by: Sequence[str] = (),
    *,
    against: str = "val_loss",
    names: Sequence[str] = CORRELATED,
    flagged: bool = False,
) -> pd.DataFrame:
    """Correlation of each metric with the loss over runs; `points` itself is the scatter.

    One row per group (values of `by`, `data` and `ffn`) and metric; runs of different `data` are
    never pooled. Rows of `final_metrics` count each seed as a point, rows of `average_seeds` each
    design: where the question is about designs, that is what n should count.

    Columns: those of `by`, `data, ffn, metric, n` (points used), `n_flagged` (points left out, or
    with `flagged` left in), `n_missing` (points without the metric or the loss), `n_heldout`
    (different held-out sets among the points used), `pearson, pearson_low, pearson_high, spearman,
    spearman_low, spearman_high`.

    Coefficients are missing for n < 3 or where one of the two does not vary. The 95% intervals are
    Fisher's, with standard error 1/√(n-3) of z for Pearson and √((1 + r²/2)/(n-3)) for Spearman
    (Bonett & Wright 2000). They suppose independent points, are rough for few, and are missing for
    n < 4 and at ±1: that all of a few points are in order bounds nothing by this method.

    Args:
        points: rows of `final_metrics`, `metrics_at_loss` or `average_seeds`.
        by: columns of `points` to group by, such as `"normalization.kind"`.
        against: the column that metrics are correlated with; `final.val_accuracy`, say, if it is
            among the factors.
        names: the metrics, columns of `points`.
        flagged: take flagged runs in, too.

    Raises:
        ConfigError: for a name that is not a column of `points`.
    """
    require_columns(points, ["flag", "heldout", *by, against, *names], "final_metrics")
    codes, groups = group_points(points, by)
    taken_in = flagged | (points["flag"] == "ok").to_numpy()
    codes = np.where(taken_in, codes, -1)
    target = points[against].to_numpy(float, na_value=np.nan)
    tables = []
    for name in names:
        metric = points[name].to_numpy(float, na_value=np.nan)
        pairs = Pairs.of(codes, metric, target, len(groups))
        used = np.where(np.isfinite(metric) & np.isfinite(target), codes, -1)
        pearson, spearman = correlation(pairs), correlation(pairs.ranked())
        pearson_low, pearson_high = pearson_interval(pearson, pairs.n)
        spearman_low, spearman_high = spearman_interval(spearman, pairs.n)
        tables.append(
            groups.drop(columns="n_flagged").assign(
                metric=name,
                n=pairs.n,
                n_flagged=groups["n_flagged"],
                n_missing=np.bincount(codes[codes >= 0], minlength=len(groups)) - pairs.n,
                n_heldout=count_distinct(used, points["heldout"], len(groups)),
                pearson=pearson,
                pearson_low=pearson_low,
                pearson_high=pearson_high,
                spearman=spearman,
                spearman_low=spearman_low,
                spearman_high=spearman_high,
            )
        )
    return interleave(tables)


def _warmup_ends(rows: pd.DataFrame, series: pd.DataFrame, runs: pd.DataFrame) -> np.ndarray:
    """The first step without warm-up of each of `series`; rows are those of all its steps."""
    last = rows.groupby("run_id", observed=True)["step"].max()
    own = runs.set_index("run_id").reindex(series["run_id"])
    n_steps = _numbers(own, "trainer.max_steps").fillna(last.reindex(own.index))
    fraction = _numbers(own, "optimizer.schedule.warmup").fillna(DEFAULT_WARMUP)
    return np.maximum(1, np.round((fraction * n_steps).to_numpy())).astype(int)


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    values = frame[name] if name in frame.columns else pd.Series(np.nan, index=frame.index)
    return pd.to_numeric(values, errors="coerce").astype(float)


def _changes(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value less the one before it in its series; missing for the first."""
    changes = np.full(len(values), np.nan)
    same = codes[1:] == codes[:-1]
    finite = np.isfinite(values)
    valid = same & finite[1:] & finite[:-1]
    changes[1:][valid] = values[1:][valid] - values[:-1][valid]
    return changes
