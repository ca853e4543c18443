"""Compares runs: one row per run, at its last step or where it reaches a given loss.

All functions return the same columns, so that their results are interchangeable as input for seed
averages, correlations, width scaling and scatter plots.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from nerve.analysis.flags import describe_runs, flag_runs
from nerve.analysis.frames import (
    AT_STEP,
    average_layers,
    group_points,
    require_columns,
    require_free,
    require_names,
    rows_of,
)
from nerve.analysis.statistics import Array
from nerve.errors import ConfigError
from nerve.metric_names import COMPARED

SIZES = ("d_ff", "n_samples")
NUMBERS = ("step", *AT_STEP, *SIZES, *COMPARED)
COUNTS = ("n_layers", "n_null")


def final_metrics(
    metrics: pd.DataFrame, runs: pd.DataFrame, factors: Sequence[str] = ()
) -> pd.DataFrame:
    """One row per run and FFN name (a Mixer has two) at the last measured step.

    Flagged runs are included, with their flag; a run without metrics has one row, with `ffn` and
    all numbers missing.

    Columns:

    - `run_id, config_id, design_id, sweep, seed`, the `factors`, `data, heldout, flag` (see
      `flag_runs`), `ffn`
    - `step, tokens_seen, val_loss, train_loss` at that step
    - `d_ff, n_samples`: means over layers
    - the metrics of `COMPARED`: means over the layers where they were measured (of exp(SE) itself)
    - `n_layers`: layers with a row; `n_null`: those where nothing could be measured (dead layers)

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        factors: columns of `runs` to keep.

    Raises:
        ConfigError: for a factor that is not a column of `runs`.
    """
    flags = flag_runs(metrics, runs)
    described = _described(metrics, runs, factors, flags)
    rows, positions = rows_of(metrics, runs)
    last = flags["final_step"].astype(float).to_numpy()[positions]
    means = average_layers(rows[rows["step"].to_numpy() == last], [*SIZES, *COMPARED])
    points = _joined(described, metrics, means)
    return points.astype(dict.fromkeys(["step", "tokens_seen"], "Int64"))


def metrics_at_loss(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    factors: Sequence[str] = (),
    loss: float | None = None,
) -> pd.DataFrame:
    """One row per run and FFN name, where the validation loss falls below a target.

    All values are interpolated between the last measured step above the target and the next one,
    linearly in the loss; otherwise runs measured every 100 steps would be compared at losses that
    differ by the progress made in 100 steps. If the loss crosses the target more than once, the
    last crossing counts.

    Columns: those of `final_metrics`, with fractional `step` and `tokens_seen`, and

    - `target_loss`: the target
    - `reached`: whether the run crossed the target between two measured steps or reached it at its
      last; if not (it ends above, or was below when first measured), step, losses and metrics are
      missing

    `n_layers` and `n_null` are the larger of the values at the two steps.

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        factors: columns of `runs` to keep.
        loss: the target, nats. None takes, for each `data`, the lowest loss that all runs with flag
            `ok` reach: the highest of their final losses.

    Raises:
        ConfigError: for a factor that is not a column of `runs`, or a loss that is not finite.
    """
    if loss is not None and not np.isfinite(loss):
        raise ConfigError(
            f"A target loss must be a finite number; got {loss!r}. Omit it to use the lowest loss "
            "that all runs reach."
        )
    flags = flag_runs(metrics, runs)
    if loss is None:
        ends = flags["final_loss"].where(flags["flag"] == "ok")
        target = ends.groupby(flags["data"].fillna("")).transform("max")
    else:
        target = pd.Series(float(loss), index=flags.index)

    described = _described(metrics, runs, factors, flags)
    rows, _ = rows_of(metrics, runs)
    means = average_layers(rows, [*SIZES, *COMPARED])
    levels = target.set_axis(flags["run_id"])
    points = _joined(described, metrics, rows_at_crossings(means, levels, list(NUMBERS)))
    column = list(points.columns).index("ffn") + 1
    points.insert(column, "target_loss", target.to_numpy()[rows_of(points, runs)[1]])
    points.insert(column + 1, "reached", points["step"].notna())
    return points


def average_seeds(points: pd.DataFrame) -> pd.DataFrame:
    """Averages runs that differ only in their seed into one row: means and SDs.

    Flagged runs are counted and excluded from the means; if all are flagged, the means are missing.

    Columns: those of `points` without `run_id, config_id, seed`, and

    - `flag`: `ok` if there is a run to average, else the flag of the first
    - `n_seeds`: runs in the means; `n_flagged`: runs excluded
    - for every number (`step`, losses, metrics) the mean under its own name and `<name>_sd`, the
      sample SD (n - 1), missing with fewer than two seeds
    - `n_layers, n_null`: sums, the number of rows behind the means; `reached`: the fraction of the
      runs that reached the target, over which alone the means are taken
    - factors unchanged; a factor that differs between the seeds is averaged like a metric if it is
      a number (`final.val_accuracy`), else missing

    Args:
        points: rows of `final_metrics` or `metrics_at_loss`.

    Raises:
        ConfigError: for a frame without their columns, such as one that is already averaged.
    """
    own = ["run_id", "config_id", "seed"]
    require_columns(points, [*own, "design_id", "flag", *NUMBERS, *COUNTS], "final_metrics")
    added = ["n_seeds", "n_flagged", *(f"{name}_sd" for name in points.columns)]
    require_free(list(points.columns), added)
    codes, groups = group_points(points, ["design_id"])
    ok = ((points["flag"] == "ok") & (codes >= 0)).to_numpy()
    # A flagged run describes a design only where there is no other.
    only = ok | ((codes >= 0) & ~np.isin(codes, codes[ok]))
    every = points[only].groupby(codes[only])
    used = points[ok].groupby(codes[ok])
    columns: dict[str, pd.Series] = {}
    spreads: dict[str, pd.Series] = {}
    for name in points.columns.drop(own):
        differs = every[name].nunique() > 1
        averaged = name in NUMBERS or (differs.any() and is_numeric_dtype(points[name]))
        if name == "flag":
            columns["flag"] = used["flag"].first().reindex(groups.index)
            columns["flag"] = columns["flag"].fillna(every["flag"].first())
            columns["n_seeds"] = used.size().reindex(groups.index, fill_value=0)
            columns["n_flagged"] = groups["n_flagged"]
        elif name in COUNTS:
            columns[name] = used[name].sum()
        elif name == "reached":
            columns[name] = used[name].mean()
        elif averaged:
            values = points.loc[ok, name].astype(float).groupby(codes[ok])
            columns[name] = values.mean()
            spreads[f"{name}_sd"] = values.std()
        else:
            columns[name] = every[name].first().where(~differs)
    return pd.DataFrame({**columns, **spreads}, index=groups.index)


def _described(
    metrics: pd.DataFrame, runs: pd.DataFrame, factors: Sequence[str], flags: pd.DataFrame
) -> pd.DataFrame:
    """Checks the frames, and returns the columns of `describe_runs` for points."""
    require_names(factors=factors)
    require_columns(metrics, [*AT_STEP, *SIZES, *COMPARED], "load_metrics")
    taken = ["ffn", "target_loss", "reached", *NUMBERS, *COUNTS]
    return describe_runs(flags, runs, factors, taken)


def _joined(described: pd.DataFrame, metrics: pd.DataFrame, means: pd.DataFrame) -> pd.DataFrame:
    """One row per run and FFN, joined with its row of `means`."""
    ffns = metrics[["run_id", "ffn"]].drop_duplicates()
    points = described.merge(ffns, on="run_id", how="left")
    points = points.merge(means, on=["run_id", "ffn"], how="left")
    points = points.astype(dict.fromkeys(COUNTS, "Int64"))
    return points[[*described.columns, "ffn", *NUMBERS, *COUNTS]]


@dataclass(frozen=True)
class Crossing:
    """A point between two measured steps.

    Attributes:
        before, after: positions of the two steps; equal if the point is a measured step.
        share: fraction of the way from the loss before to the loss after, in [0, 1].
    """

    before: int
    after: int
    share: float

    def interpolate(self, series: Array) -> Array:
        """The value of a series at this point, linear in the loss; shape (step, …) gives (…)."""
        first, last = series[self.before], series[self.after]
        return first + self.share * (last - first)


def last_crossing(loss: Array, level: float) -> Crossing | None:
    """Where a loss crosses a level for the last time and then stays at or below it.

    A loss that ends exactly at the level crosses it at its last step. None for a loss that ends
    above the level, and for one that was never measured above it.

    Args:
        loss: in the order of steps, shape (step,).
    """
    last = len(loss) - 1
    if last >= 0 and loss[last] == level:
        return Crossing(last, last, 0.0)
    above = np.flatnonzero(loss > level)
    if not len(above) or above[-1] == last:
        return None
    i = int(above[-1])
    if loss[i + 1] == level:  # nothing to interpolate: a metric may be missing at the step before
        return Crossing(i + 1, i + 1, 0.0)
    return Crossing(i, i + 1, float((loss[i] - level) / (loss[i] - loss[i + 1])))


def rows_at_crossings(means: pd.DataFrame, levels: pd.Series, names: list[str]) -> pd.DataFrame:
    """Rows of `average_layers`, interpolated where each run and FFN crosses the level of its run.

    The counts are the larger of those at the two steps; everything else is interpolated.

    Args:
        means: has the columns `run_id, ffn, step, val_loss, n_layers, n_null` and `names`.
        levels: the target loss, by `run_id`; a run without one has no row.
    """
    found = []
    finite = means[np.isfinite(means["val_loss"])].sort_values("step")
    for (run_id, ffn), rows in finite.groupby(["run_id", "ffn"], sort=False, observed=True):
        place = last_crossing(rows["val_loss"].to_numpy(float), float(levels.get(run_id, np.nan)))
        if place is None:
            continue
        values = rows[names].to_numpy(float, na_value=np.nan)
        counts = rows[["n_layers", "n_null"]].to_numpy(int)
        more = np.maximum(counts[place.before], counts[place.after])
        found.append((run_id, ffn, *place.interpolate(values), *more))
    columns = ["run_id", "ffn", *names, "n_layers", "n_null"]
    return pd.DataFrame(found, columns=columns)
