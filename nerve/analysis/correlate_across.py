"""Correlates final metrics with the final loss across runs, and controls for the training step or
the factors that were varied."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nerve.analysis.correlate import null_columns
from nerve.analysis.factors import as_number, is_number, ordered_levels
from nerve.analysis.frames import (
    count_distinct,
    group_points,
    interleave,
    number_rows,
    require_columns,
    require_free,
    require_names,
)
from nerve.analysis.partial import partial_over_runs
from nerve.analysis.statistics import (
    Array,
    Pairs,
    correlation,
    pearson_interval,
    spearman_interval,
)
from nerve.config import require
from nerve.metric_names import CORRELATED

_ACROSS = (
    *("metric", "n", "n_flagged", "n_missing", "n_heldout", "pearson", "pearson_low"),
    *("pearson_high", "spearman", "spearman_low", "spearman_high"),
)
"""The columns of a correlation across runs, apart from those of null models."""


def correlate_across_runs(
    points: pd.DataFrame,
    by: Sequence[str] = (),
    *,
    against: str = "val_loss",
    given: Sequence[str] = (),
    names: Sequence[str] = CORRELATED,
    flagged: bool = False,
) -> pd.DataFrame:
    """Correlation of each metric with the loss over runs; `points` itself is the scatter plot.

    One row per group (values of `by`, `data` and `ffn`) and metric; runs with different `data` are
    never pooled. With rows of `final_metrics` each seed is a point, with rows of `average_seeds`
    each design: use the latter for questions about designs, so that n counts designs.

    Columns: those of `by`, `data, ffn, metric, n` (points used), `n_flagged` (flagged points: left
    out, or included with `flagged`), `n_missing` (points without the metric or the loss),
    `n_heldout` (different held-out sets among the points used), `pearson, pearson_low,
    pearson_high, spearman, spearman_low, spearman_high`; and for the clock, log(step + 1) of each
    point, and for each factor of `given` (`ffn.width`, `optimizer.lr`) the columns of
    `null_columns`:

    - `r_clock, r_ffn.width`: Pearson's r of this null model and the loss
    - `given_clock`: the partial r of metric and loss given it, missing for n < 4 and if it does not
      vary
    - `given_clock_low, given_clock_high`: its 95% interval, by a bootstrap over designs, missing
      for fewer than 8 designs

    Coefficients are missing for n < 3 or if one of the two does not vary. The 95% intervals are
    Fisher's, with standard error 1/√(n-3) of z for Pearson and √((1 + r²/2)/(n-3)) for Spearman
    (Bonett & Wright 2000). They assume independent points, are rough for small n, and are missing
    for n < 4 and at ±1: a perfect ordering of a few points gives no bound by this method.

    Args:
        points: rows of `final_metrics`, `metrics_at_loss` or `average_seeds`.
        by: columns of `points` to group by, such as `"normalization.kind"`.
        against: the column to correlate the metrics with; for example `final.val_accuracy`, if it
            is among the factors.
        given: numeric columns of `points` (a width may be `"8/3"`): the factors that were varied,
            which may rank the losses as well as any metric does.
        names: the metrics, columns of `points`.
        flagged: whether to include flagged runs.

    Raises:
        ConfigError: for a name that is not a column of `points`, or a `given` column whose values
            are strings.
    """
    require_names(by=by, given=given, names=names)
    needed = ["design_id", "step", "flag", "heldout", *by, against, *given, *names]
    require_columns(points, needed, "final_metrics")
    require_free([*by, *given], [*_ACROSS, "clock", *null_columns("clock")])
    nulls = {"clock": np.log1p(points["step"].to_numpy(float, na_value=np.nan))}
    nulls |= {name: _factor_numbers(points[name]) for name in given}
    designs = number_rows(points, ["design_id"])
    codes, groups = group_points(points, by)
    taken_in = flagged | (points["flag"] == "ok").to_numpy()
    codes = np.where(taken_in, codes, -1)
    target = points[against].to_numpy(float, na_value=np.nan)
    tables = []
    for name in names:
        metric = points[name].to_numpy(float, na_value=np.nan)
        used = np.where(np.isfinite(metric) & np.isfinite(target), codes, -1)
        beside: dict[str, Array] = {}
        for null, values in nulls.items():
            r = correlation(Pairs.of(used, values, target, len(groups)))
            partial = partial_over_runs(used, designs, metric, target, values, len(groups))
            beside |= dict(zip(null_columns(null), (r, *partial), strict=True))
        tables.append(
            groups.drop(columns="n_flagged").assign(
                metric=name,
                n=np.bincount(used[used >= 0], minlength=len(groups)),
                n_flagged=groups["n_flagged"],
                n_missing=np.bincount(codes[(codes >= 0) & (used < 0)], minlength=len(groups)),
                n_heldout=count_distinct(used, points["heldout"], len(groups)),
                **_with_intervals(Pairs.of(codes, metric, target, len(groups))),
                **beside,
            )
        )
    return interleave(tables)


def _with_intervals(pairs: Pairs) -> dict[str, Array]:
    """Pearson's and Spearman's coefficients of each group, with their intervals."""
    pearson, spearman = correlation(pairs), correlation(pairs.ranked())
    pearson_low, pearson_high = pearson_interval(pearson, pairs.n)
    spearman_low, spearman_high = spearman_interval(spearman, pairs.n)
    return {
        "pearson": pearson,
        "pearson_low": pearson_low,
        "pearson_high": pearson_high,
        "spearman": spearman,
        "spearman_low": spearman_low,
        "spearman_high": spearman_high,
    }


def _factor_numbers(values: pd.Series) -> Array:
    """The values of a factor as numbers, missing ones as NaN."""
    wrong = [
        level for level in ordered_levels(values) if level is not None and not is_number(level)
    ]
    require(
        not wrong,
        f"A column in given must be numeric; {values.name} has "
        f"{', '.join(map(repr, wrong[:3]))}. Correlate within its levels: by=[{values.name!r}].",
    )
    return np.array([as_number(level) for level in values.where(values.notna(), np.nan)], float)
