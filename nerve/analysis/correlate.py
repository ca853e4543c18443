"""Correlates metrics with the loss within each run, and controls for the training step or the
learning rate.

The loss falls over time whatever is measured: log(step + 1) alone correlates with it as well as any
metric does. Each r is therefore reported with that of such null models, and the partial r given
each.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from nerve.analysis.flags import describe_runs, flag_runs
from nerve.analysis.frames import (
    average_layers,
    join_runs,
    number_rows,
    require_columns,
    require_names,
    rows_of,
)
from nerve.analysis.partial import partial_over_steps
from nerve.analysis.statistics import (
    Array,
    Counts,
    Pairs,
    correlation,
)
from nerve.metric_names import CORRELATED

WINDOWS = ("all", "after_warmup", "differences")
"""The sets of steps over which correlations within a run are computed."""

NULLS = ("clock", "lr")
"""The null models within a run."""

DEFAULT_WARMUP = 0.05
"""Fraction of the steps excluded as warm-up for a run whose configuration has no warm-up."""


def null_columns(null: str) -> list[str]:
    """The columns of a null model: its r with the loss, the partial r given it, the interval."""
    return [f"r_{null}", f"given_{null}", f"given_{null}_low", f"given_{null}_high"]


RESULTS = ("n", "pearson", "spearman", *(name for null in NULLS for name in null_columns(null)))
"""The columns of a correlation within a run."""


def correlate_within_runs(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    factors: Sequence[str] = (),
    *,
    by_layer: bool = False,
    names: Sequence[str] = CORRELATED,
) -> pd.DataFrame:
    """Correlation of each metric with the validation loss over the measured steps of each run.

    One row per run, FFN name, (layer,) metric and window. A single number is misleading: step 0 is
    often far from all other points, and two series that both drift are correlated in any case.
    Windows:

    - `all`: all measured steps
    - `after_warmup`: steps ≥ max(1, round(warmup · max_steps)), from `optimizer.schedule.warmup`
      and `trainer.max_steps` of the run; if these are missing, `DEFAULT_WARMUP` of its last
      measured step
    - `differences`: changes between consecutive measured steps with a loss, both `after_warmup`,
      because a change from step 0 would dominate all others

    The points of one run are not independent, so r has no interval. The null models are the clock,
    log(step + 1), and the learning rate (of the hidden weights); for `differences`, their changes.

    Columns: `run_id, config_id, design_id, sweep, seed`, the `factors`, `data, heldout, flag, ffn`,
    `layer` (with `by_layer`), `metric, window, first_step` (of the window), `n` (pairs), `pearson,
    spearman`, both in [-1, 1], missing for n < 3 and if metric or loss does not vary; and for
    `clock` and `lr` each

    - `r_clock`: Pearson's r of the null model and the loss
    - `given_clock`: the partial r of metric and loss given the null model (linear in it), missing
      for n < 4 and if the metric is a linear function of the null model
    - `given_clock_low, given_clock_high`: its 95% interval over steps, by a block bootstrap
      (`partial_over_steps`), missing for n < 8

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        factors: columns of `runs` to keep.
        by_layer: use each layer's metric instead of the mean over layers.
        names: the metrics, columns of `metrics`.

    Raises:
        ConfigError: for a name or factor that is not a column, or a factor that the frame already
            has.
    """
    require_names(factors=factors, names=names)
    keys = ["run_id", "ffn", *(["layer"] if by_layer else [])]
    require_columns(metrics, [*keys, "step", "val_loss", "lr", *names], "load_metrics")
    taken = ["ffn", "layer", "metric", "window", "first_step", *RESULTS]
    described = describe_runs(flag_runs(metrics, runs), runs, factors, taken)
    rows, _ = rows_of(metrics, runs)
    if not by_layer:
        rows = average_layers(rows, [*names, "lr"])
    codes = number_rows(rows, keys)
    order = np.lexsort((rows["step"], codes))
    rows, codes = rows.take(order), codes[order]
    series = rows.drop_duplicates(keys)[[*keys, "step"]].reset_index(drop=True)
    n_series = len(series)

    warmed_up = _warmup_ends(rows, series, runs)
    late = np.where(rows["step"].to_numpy() >= warmed_up[codes], codes, -1)
    results = _in_windows(rows, names, codes, late, n_series)
    starts = np.stack([series["step"], warmed_up, warmed_up])
    table = series.loc[series.index.repeat(len(results)), keys].reset_index(drop=True)
    table["metric"] = np.tile(np.repeat(np.array(names, dtype=object), len(WINDOWS)), n_series)
    table["window"] = np.tile(np.array(WINDOWS, dtype=object), n_series * len(names))
    table["first_step"] = np.tile(starts, (len(names), 1)).T.ravel()
    for name in RESULTS:
        table[name] = np.stack([result[name] for result in results]).T.ravel()
    return join_runs(table, described)


def _in_windows(
    rows: pd.DataFrame, names: Sequence[str], codes: Counts, late: Counts, n_series: int
) -> list[dict[str, Array | Counts]]:
    """The `RESULTS` of all series, for each metric in each of `WINDOWS`.

    Args:
        rows: in the order of series and steps.
        codes: the series of each row.
        late: the same, -1 during warm-up.
    """
    values = {name: rows[name].to_numpy(float) for name in (*names, "val_loss", "lr")}
    values["clock"] = np.log1p(rows["step"].to_numpy(float))
    # A run may be evaluated less often than measured.
    has_loss = ~np.isnan(values["val_loss"])
    evaluated = late[has_loss]
    changes = {name: _changes(evaluated, own[has_loss]) for name, own in values.items()}
    windows = ((codes, values), (late, values), (evaluated, changes))
    nulls = [_r_of_nulls(codes, own, n_series) for codes, own in windows]
    partials = [_beside_nulls(names, codes, own, n_series) for codes, own in windows]
    return [
        _of_metric(name, codes, own, n_series) | of_nulls | beside_nulls[place]
        for place, name in enumerate(names)
        for (codes, own), of_nulls, beside_nulls in zip(windows, nulls, partials, strict=True)
    ]


def _r_of_nulls(
    codes: Counts, values: Mapping[str, Array], n_series: int
) -> dict[str, Array | Counts]:
    """r of each null model with the loss in a window."""
    return {
        f"r_{null}": correlation(Pairs.of(codes, values[null], values["val_loss"], n_series))
        for null in NULLS
    }


def _of_metric(
    name: str, codes: Counts, values: Mapping[str, Array], n_series: int
) -> dict[str, Array | Counts]:
    """The correlations of a metric with the loss in a window."""
    pairs = Pairs.of(codes, values[name], values["val_loss"], n_series)
    return {
        "n": pairs.n,
        "pearson": correlation(pairs),
        "spearman": correlation(pairs.ranked()),
    }


def _beside_nulls(
    names: Sequence[str], codes: Counts, values: Mapping[str, Array], n_series: int
) -> list[dict[str, Array | Counts]]:
    """The partial correlations of each metric with the loss in a window, given each null model."""
    found: list[dict[str, Array | Counts]] = [{} for _ in names]
    metrics = np.stack([values[name] for name in names])
    for null in NULLS:
        partials = partial_over_steps(codes, metrics, values["val_loss"], values[null], n_series)
        columns = null_columns(null)[1:]
        for place, own in enumerate(found):
            own |= dict(zip(columns, partials[:, place], strict=True))
    return found


def _warmup_ends(rows: pd.DataFrame, series: pd.DataFrame, runs: pd.DataFrame) -> np.ndarray:
    """The first step after warm-up of each of `series`; `rows` has all their steps."""
    last = rows.groupby("run_id", observed=True)["step"].max()
    own = runs.set_index("run_id").reindex(series["run_id"])
    n_steps = _numbers(own, "trainer.max_steps")
    n_steps = n_steps.where(n_steps > 0).fillna(last.reindex(own.index))  # -1 means no limit
    fraction = _numbers(own, "optimizer.schedule.warmup").fillna(DEFAULT_WARMUP)
    return np.maximum(1, np.round((fraction * n_steps).to_numpy())).astype(int)


def _numbers(frame: pd.DataFrame, name: str) -> pd.Series:
    values = frame[name] if name in frame.columns else pd.Series(np.nan, index=frame.index)
    return pd.to_numeric(values, errors="coerce").astype(float)


def _changes(codes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each value minus the previous one of its series; missing for the first."""
    changes = np.full(len(values), np.nan)
    same = codes[1:] == codes[:-1]
    finite = np.isfinite(values)
    valid = same & finite[1:] & finite[:-1]
    changes[1:][valid] = values[1:][valid] - values[:-1][valid]
    return changes
