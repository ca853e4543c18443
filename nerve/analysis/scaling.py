"""How the number of used dimensions scales with the width of the FFN."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nerve.analysis.frames import (
    count_distinct,
    group_points,
    interleave,
    require_columns,
    require_free,
    require_names,
)
from nerve.analysis.statistics import Pairs, fit_line
from nerve.metric_names import columns_of

SCALING_NAMES = columns_of(lambda metric: metric.compared and metric.unit == "dimensions")
"""The metrics that count dimensions."""

_FITTED = (
    *("metric", "n", "n_points", "n_flagged", "n_missing", "n_heldout", "d_ff_min", "d_ff_max"),
    *("exponent", "exponent_low", "exponent_high", "coefficient", "r_squared"),
)
"""The columns of a fit."""


def fit_width_scaling(
    points: pd.DataFrame,
    by: Sequence[str] = (),
    *,
    names: Sequence[str] = SCALING_NAMES,
    flagged: bool = False,
) -> pd.DataFrame:
    """Fits a power law metric = coefficient · d_ff^exponent, by least squares of the logarithms.

    One row per group (values of `by`, `data` and `ffn`) and metric. Runs of the same width are
    averaged first (mean logarithm), so that n counts widths: deviations of a width are common to
    all its runs, and more seeds do not add widths. Exponent 1: a fixed fraction of the width is
    used; 0: additional width is not used. Before the nonlinearity no rank exceeds d_in, which
    limits the growth.

    Columns: those of `by`, `data, ffn, metric, n` (widths), `n_points` (rows used), `n_flagged`
    (flagged rows: left out, or included with `flagged`), `n_missing` (rows without the metric),
    `n_heldout` (different held-out sets among the rows used), `d_ff_min, d_ff_max, exponent,
    exponent_low, exponent_high, coefficient, r_squared`.

    Exponent and coefficient are missing for n < 2, the 95% interval (Student's t with n - 2 degrees
    of freedom) and r_squared for n < 3.

    Args:
        points: rows of `final_metrics`, `metrics_at_loss` or `average_seeds`.
        by: columns of `points` to group by.
        names: the metrics, positive columns of `points`.
        flagged: whether to include flagged runs.

    Raises:
        ConfigError: for a name that is not a column of `points`.
    """
    require_names(by=by, names=names)
    require_columns(points, ["flag", "heldout", "d_ff", *by, *names], "final_metrics")
    require_free(by, _FITTED)
    codes, groups = group_points(points, by)
    n_groups = len(groups)
    codes = np.where(flagged | (points["flag"] == "ok").to_numpy(), codes, -1)
    width = points["d_ff"].to_numpy(float, na_value=np.nan)
    tables = []
    for name in names:
        metric = points[name].to_numpy(float, na_value=np.nan)
        valid = (codes >= 0) & np.isfinite(metric) & (metric > 0) & (width > 0)
        used = codes[valid]
        logs = pd.DataFrame({"group": used, "x": np.log(width[valid]), "y": np.log(metric[valid])})
        widths = logs.groupby(["group", "x"])["y"].mean().reset_index()
        pairs = Pairs.of(
            widths["group"].to_numpy(), widths["x"].to_numpy(), widths["y"].to_numpy(), n_groups
        )
        line = fit_line(pairs)
        by_group = pd.Series(width[valid]).groupby(used)
        tables.append(
            groups.drop(columns="n_flagged").assign(
                metric=name,
                n=pairs.n,
                n_points=np.bincount(used, minlength=n_groups),
                n_flagged=groups["n_flagged"],
                n_missing=np.bincount(codes[(codes >= 0) & ~valid], minlength=n_groups),
                n_heldout=count_distinct(np.where(valid, codes, -1), points["heldout"], n_groups),
                d_ff_min=by_group.min().reindex(groups.index),
                d_ff_max=by_group.max().reindex(groups.index),
                exponent=line.slope,
                exponent_low=line.low,
                exponent_high=line.high,
                coefficient=np.exp(line.intercept),
                r_squared=line.r_squared,
            )
        )
    return interleave(tables)
