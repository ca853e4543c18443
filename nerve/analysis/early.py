"""Early ranking: how well metrics at an early step predict the final loss, beyond the loss so
far."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from nerve.analysis.factors import overrides
from nerve.analysis.flags import describe_runs, flag_runs
from nerve.analysis.frames import (
    AT_STEP,
    average_layers,
    join_runs,
    number_rows,
    require_columns,
    require_names,
    rows_of,
)
from nerve.analysis.partial import cluster_counts, interval_of_draws
from nerve.analysis.statistics import Array, Counts
from nerve.metric_names import CORRELATED

BUDGET = (
    "trainer.max_steps",
    "trainer.accumulate_grad_batches",
    "data.batch_size",
    "data.seq_len",
    "model.seq_len",
)
"""How much a run trains on, and on sequences of which length."""

SCHEDULE = "optimizer.schedule."
"""Prefix of the schedule's keys: runs are ranked within one budget and one schedule."""

ESTIMATES = ("kendall", "loss_kendall", "given_loss")

MOST_RUNS = 300
"""The most runs of a group that are ranked; in a larger group only some designs are. An interval
takes all pairs of runs a thousand times, and their number grows with the square of the runs."""


def rank_early(
    metrics: pd.DataFrame,
    runs: pd.DataFrame,
    by: Sequence[str] = (),
    *,
    names: Sequence[str] = CORRELATED,
) -> pd.DataFrame:
    """How well each metric at each measured step ranks runs by their final loss.

    One row per group, step and metric. A group has the same `data`, FFN name, `schedule` and values
    of `by`: a longer run reaches a lower loss whatever its spectra are. Flagged runs are left out.

    A metric that follows the loss ranks the final loss as well as the loss so far does, which is
    available for free. The relevant column is therefore `given_loss`, Kendall's partial τ of the
    metric and the final loss given the validation loss at the same step, (τ_mf - τ_ml·τ_lf)/√((1 -
    τ_ml²)(1 - τ_lf²)). Below 0: of two runs with the same loss so far, the one with the higher
    metric tends to have the lower final loss.

    A partial τ is not exactly 0 if the metric only reflects the loss so far: a noisy copy of it has
    about ±.1. `null` is its value if metric and final loss are independent given the loss, and all
    three are Gaussian up to monotone transformations (τ = (2/π) asin ρ). An interval that excludes
    0 but not `null` is no evidence.

    Columns: those of `by`, `data, ffn, schedule` (budget and schedule as overrides), `step, metric,
    n` (runs), `n_designs`, and with `_low` and `_high`, the 95% interval, each of

    - `kendall`: τ (τ-b) of the metric (mean over layers) and the final loss
    - `loss_kendall`: τ of the loss so far and the final loss; 1 at the last step
    - `given_loss`: the partial τ; missing if one of the two other τ with the loss is ±1

    and `null`, to be compared with `given_loss`.

    In a group of more than `MOST_RUNS` runs, a sample of the designs is ranked: the first in the
    order of `design_id`, which is as good as random and reproducible.

    Intervals are from a bootstrap over designs (seeds of a design are not independent runs),
    missing for fewer than 8 designs; τ is missing for fewer than 4 runs and if nothing varies.

    Args:
        metrics: rows of `load_metrics`.
        runs: rows of `load_runs`.
        by: further columns of `runs` to group by, such as `"model.d_model"`.
        names: the metrics, columns of `metrics`.

    Raises:
        ConfigError: for a name or factor that is not a column.
    """
    require_names(by=by, names=names)
    require_columns(metrics, ["run_id", "ffn", "step", "val_loss", *names], "load_metrics")
    taken = ["schedule", "metric", "n", "n_designs", "null", *ESTIMATES, "final_loss"]
    taken += ["ffn", "step", "n_layers", "n_null", *AT_STEP, *names]
    flags = flag_runs(metrics, runs)
    described = describe_runs(flags, runs, by, taken)
    described = described.assign(schedule=_schedules(runs), final_loss=flags["final_loss"])
    rows, _ = rows_of(metrics, runs)
    rows = join_runs(average_layers(rows, names), described[described["flag"] == "ok"])
    keys = [*dict.fromkeys([*by, "data", "ffn", "schedule"])]
    tables = []
    for _, group in rows.groupby(number_rows(rows, keys)):
        group = _sampled(group)
        for step, at_step in group.groupby("step"):
            found = _of_step(at_step.dropna(subset=["val_loss", "final_loss"]), names)
            first = group[keys].iloc[[0] * len(found)].reset_index(drop=True)
            tables.append(first.assign(step=step).join(found))
    if not tables:
        estimates = [f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")]
        return pd.DataFrame(columns=[*keys, "step", "metric", "n", "n_designs", *estimates, "null"])
    return pd.concat(tables, ignore_index=True)


def _schedules(runs: pd.DataFrame) -> list[str]:
    """Budget and schedule of each run as overrides; values that are not set are omitted."""
    names = [name for name in BUDGET if name in runs]
    names += sorted(name for name in runs.columns if name.startswith(SCHEDULE))
    return overrides(runs, names)


def _sampled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first designs, as many as have at most `MOST_RUNS` runs together; of a first
    design with more runs, those of its first runs."""
    n_runs = rows.groupby("design_id")["run_id"].nunique()
    kept = n_runs.index[n_runs.cumsum() <= MOST_RUNS]
    if len(kept) == len(n_runs):
        return rows
    own = rows[rows["design_id"].isin(kept if len(kept) else n_runs.index[:1])]
    return own[own["run_id"].isin(sorted(own["run_id"].unique())[:MOST_RUNS])]


def _of_step(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row per metric, for the runs of one group at one step."""
    of_all, found = _Losses.of(rows), []
    for name in names:
        has = rows[name].notna()
        losses = of_all if has.all() else _Losses.of(rows[has])
        estimates, null = _estimates(Order(rows.loc[has, name].to_numpy(float)), losses)
        n, n_designs = losses.samples.members.shape
        row: dict[str, object] = {"metric": name, "n": n, "n_designs": n_designs}
        for kind, values in zip(ESTIMATES, estimates, strict=True):
            draws = values[1:]
            ends = interval_of_draws(draws) if len(draws) else [np.nan] * 2
            row |= {
                kind: values[0] if n > 3 else np.nan,
                f"{kind}_low": float(ends[0]),
                f"{kind}_high": float(ends[1]),
            }
        found.append(row | {"null": null})
    return pd.DataFrame(found)


def _estimates(metric: "Order", losses: "_Losses") -> tuple[list[Array], float]:
    """The three `ESTIMATES` in each sample, each of shape (sample,), and the partial τ of a metric
    and a final loss that are related only through the loss so far."""
    of_loss = losses.kendall
    with_final, with_loss = (
        metric.kendall(other, losses.samples) for other in (losses.final, losses.so_far)
    )
    rho = np.sin(np.pi / 2 * with_loss[:1]) * np.sin(np.pi / 2 * of_loss[:1])
    (null,) = _partial(2 / np.pi * np.arcsin(rho), with_loss[:1], of_loss[:1])
    return [with_final, of_loss, _partial(with_final, with_loss, of_loss)], float(null)


def _partial(with_final: Array, with_loss: Array, of_loss: Array) -> Array:
    left = np.sqrt(np.maximum((1 - with_loss**2) * (1 - of_loss**2), 0.0))
    given = np.full_like(left, np.nan)
    np.divide(with_final - with_loss * of_loss, left, out=given, where=left > 1e-9)
    return given


@dataclass(frozen=True)
class Samples:
    """Samples of values, in which all values of a cluster are drawn together.

    Sums over pairs of values are computed from those over pairs of clusters. They are integers, so
    that float32 holds them exactly.

    Attributes:
        cluster: the cluster of each value, an integer from 0, shape (value,).
        counts: how often each cluster is drawn, shape (sample, cluster).
    """

    cluster: Counts
    counts: Array

    @cached_property
    def members(self) -> np.ndarray:
        """Whether each value is in each cluster, 0 or 1, shape (value, cluster)."""
        members = np.zeros((len(self.cluster), self.counts.shape[1]), np.float32)
        members[np.arange(len(self.cluster)), self.cluster] = 1
        return members

    @cached_property
    def _counts(self) -> np.ndarray:
        return self.counts.astype(np.float32)

    def sum_over_pairs(self, values: np.ndarray) -> Array:
        """The sum of `values`, shape (value, value), over all pairs of values, shape (sample,)."""
        of_clusters = self.members.T @ values @ self.members
        return np.asarray(np.einsum("bi,bi->b", self._counts @ of_clusters, self.counts))

    @cached_property
    def n_pairs(self) -> Array:
        """The number of ordered pairs of values, shape (sample,)."""
        return np.asarray((self.counts @ self.members.sum(axis=0)) ** 2)

    @cached_property
    def n_same(self) -> Array:
        """The number of pairs of a value with itself, which may be drawn several times."""
        return np.asarray(self.counts**2 @ self.members.sum(axis=0))


@dataclass(frozen=True)
class Order:
    """The order relation of each pair of values."""

    values: Array

    @cached_property
    def signs(self) -> np.ndarray:
        """1 above, 0 equal, -1 below, shape (n, n)."""
        row, column = self.values[:, None], self.values[None, :]  # a difference of ∞ would be NaN
        return (row > column).astype(np.float32) - (row < column)

    def kendall(self, other: "Order", samples: Samples) -> Array:
        """Kendall's τ-b in each sample; a value that is drawn twice is tied with itself.

        Returns:
            Shape (sample,), NaN if all values of one of the two are equal.
        """
        both = samples.sum_over_pairs(self.signs * other.signs)
        size = np.sqrt(self.n_untied(samples) * other.n_untied(samples))
        tau = np.full(len(both), np.nan)
        np.divide(both, size, out=tau, where=size > 0)
        return tau

    def n_untied(self, samples: Samples) -> Array:
        """The number of ordered pairs of different values in each sample, shape (sample,)."""
        if len(np.unique(self.values)) == len(self.values):
            return samples.n_pairs - samples.n_same
        return samples.sum_over_pairs(np.abs(self.signs))


@dataclass(frozen=True)
class _Losses:
    """The losses of the runs of a group at a step.

    Attributes:
        so_far, final: the order of the runs by the loss at this step, and by the final loss.
        samples: the runs themselves, and those of a bootstrap over designs.
    """

    so_far: Order
    final: Order
    samples: Samples

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "_Losses":
        so_far, final = (Order(rows[name].to_numpy(float)) for name in ("val_loss", "final_loss"))
        designs = number_rows(rows, ["design_id"])
        n = int(designs.max(initial=-1)) + 1
        counts, draws = np.ones((1, n)), cluster_counts(n)
        counts = counts if draws is None else np.concatenate([counts, draws])
        return cls(so_far, final, Samples(designs, counts))

    @cached_property
    def kendall(self) -> Array:
        """τ of the two losses in each sample."""
        return self.so_far.kendall(self.final, self.samples)
