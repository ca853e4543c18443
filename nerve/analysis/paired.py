"""Compares designs that differ in one factor only, with runs paired by seed."""

from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from typing import Any

import numpy as np
import pandas as pd

from nerve.analysis.early import BUDGET
from nerve.analysis.estimate import Estimate, Outcome, decide
from nerve.analysis.factors import find_factors, level_text, ordered_levels, overrides
from nerve.analysis.frames import number_rows, require_columns, require_names
from nerve.analysis.paired_fit import paired_by_seed
from nerve.analysis.statistics import Array
from nerve.errors import ConfigError
from nerve.metric_names import CORRELATED, metric_of

SCALE = ("model.kind", "model.n_layers", "model.d_model", *BUDGET)
"""Designs of one scale share these values, and the variance over their seeds is pooled."""

PAIRED = ("val_loss", *CORRELATED)

OUTCOMES: dict[Outcome, str] = {
    "holds": "higher",
    "opposite": "lower",
    "within noise": "within noise",
    "undecided": "undecided",
}
"""The outcome in words, by what `decide` says about the claim that `level` has the higher value."""


def compare_seeds(
    points: pd.DataFrame,
    runs: pd.DataFrame,
    factor: str,
    *,
    names: Sequence[str] = PAIRED,
) -> pd.DataFrame:
    """Differences between designs that differ in one factor only, with runs paired by seed.

    Runs with the same seed have the same initialization and order of data, so that effects of the
    seed common to both designs cancel in the difference. The error is that of the model value =
    design + seed + error, by least squares over all designs of one scale (`SCALE` apart from the
    factor and what is confounded with it, the same `data` and FFN name), not only the two compared:
    two or three seeds say very little about a variance.
    The designs of a sweep usually give enough degrees of freedom; with fewer than 3, the outcome is
    `undecided`.

    One row per pair of levels, setting of the other factors, FFN name and metric. Columns:

    - `factor, level, other`: the difference is `level` minus `other`
    - `where`: the other factors that vary, as overrides; `data, ffn, metric`
    - `unit`: `nats` if the difference is one of natural logarithms (of PR and its gain; .1 is 10%),
      else empty: that of the metric
    - `n_pairs`: seeds that both designs have; `n_higher`: those in which `level` is higher
    - `difference, low, high`: with its 95% interval (Student's t with `df`)
    - `sd`: residual SD of one run, given design and seed; `df`: its degrees of freedom;
      `n_designs`: designs pooled
    - `outcome`: `higher` or `lower` if the interval excludes 0, `within noise`, `undecided`

    Args:
        points: rows of `final_metrics` or `metrics_at_loss`; flagged ones are left out.
        runs: rows of `load_runs`.
        factor: a column of `runs` that varies.
        names: the metrics to compare, columns of `points`.

    Raises:
        ConfigError: for a name that is not a column, or a factor that does not vary or is
            confounded with another.
    """
    require_names(names=names)
    require_columns(
        points, ["run_id", "design_id", "seed", "flag", "data", *names], "final_metrics"
    )
    require_columns(runs, [factor], "load_runs")
    flagged = points.drop_duplicates("run_id")["flag"].value_counts()
    points = points[(points["flag"] == "ok") & points["seed"].notna() & points["ffn"].notna()]
    runs = runs[runs["run_id"].isin(points["run_id"])]
    if runs.empty:
        counts = ", ".join(f"{flag}: {n:,}" for flag, n in flagged.items())
        raise ConfigError(
            "Only runs with the flag ok and a seed can be compared; there are none "
            f"({counts or 'no runs'}). nerve.flag_runs gives the reasons."
        )
    factors = find_factors(runs)
    others = [name for name in (*factors.varying, *factors.taken) if name != factor]
    if factor not in factors.varying:
        owner = next((name for name, own in factors.together.items() if factor in own), None)
        reason = f"is confounded with {owner}" if owner else "has one level"
        raise ConfigError(
            "A factor to compare must vary among the runs that can be compared; "
            f"{factor} {reason}. Factors that vary: {', '.join(factors.varying) or 'none'}."
        )
    compared = {factor, *factors.together.get(factor, ())}
    scale = [name for name in SCALE if name in runs and name not in compared]
    # The others are kept as a number and a text: their names may be those of results.
    settings = runs.assign(_alike=number_rows(runs, others), _where=overrides(runs, others))
    settings = settings.set_index("run_id")[[*dict.fromkeys([*scale, factor, "_alike", "_where"])]]
    own = points[["run_id", "design_id", "seed", "data", "ffn", *names]]
    own = own.join(settings, on="run_id")
    rows = [
        {"factor": factor, **row}
        for _, group in own.groupby(number_rows(own, [*scale, "data", "ffn"]))
        for row in _of_scale(group, factor, names)
    ]
    columns = ["factor", "level", "other", "where", "data", "ffn", "metric", "unit", "n_pairs"]
    columns += ["n_higher", "difference", "low", "high", "sd", "df", "n_designs", "outcome"]
    return pd.DataFrame(rows, columns=columns)


def _of_scale(points: pd.DataFrame, factor: str, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one scale, data and FFN."""
    design = points["design_id"].to_numpy(str)
    designs, of_design = np.unique(design, return_inverse=True)
    of_seed, _ = pd.factorize(points["seed"], sort=True)  # a seed may have more than 64 bits
    pairs = [*_pairs(points, factor)]
    ids = np.array([[one["design_id"], two["design_id"]] for one, two, _ in pairs], dtype=str)
    one, two = np.searchsorted(designs, ids.reshape(-1, 2)).T
    found = {}
    for name in names:
        values, unit = on_scale(name, points[name].to_numpy(float, na_value=np.nan))
        kept = np.isfinite(values)
        table = np.full((len(designs), of_seed.max(initial=-1) + 1), np.nan)
        table[of_design[kept], of_seed[kept]] = values[kept]
        shared = np.isfinite(table[one]) & np.isfinite(table[two])
        some = np.flatnonzero(shared.any(axis=1))
        if not len(some):
            continue
        fit = paired_by_seed(design[kept], of_seed[kept])
        places = np.searchsorted(fit.designs, designs)
        effects = fit.differences(values[kept], *(places[own[some]] for own in (one, two)))
        n_pairs = shared.sum(axis=1)
        n_higher = (shared & (table[two] > table[one])).sum(axis=1)
        estimates = {
            int(pair): Estimate.of(effects, i, int(n_pairs[pair]), 2 * int(n_pairs[pair]))
            for i, pair in enumerate(some)
        }
        found[name] = unit, len(fit.designs), n_higher, estimates
    for i, (first, second, where) in enumerate(pairs):
        for name, (unit, n_designs, n_higher, estimates) in found.items():
            if i not in estimates:
                continue
            estimate = estimates[i]
            yield {
                "level": level_text(second[factor]),
                "other": level_text(first[factor]),
                "where": where,
                "data": first["data"],
                "ffn": first["ffn"],
                "metric": name,
                "unit": unit,
                "n_pairs": estimate.n_seeds,
                "n_higher": int(n_higher[i]),
                "difference": estimate.effect,
                "low": estimate.low,
                "high": estimate.high,
                "sd": estimate.sd,
                "df": estimate.df,
                "n_designs": n_designs,
                "outcome": OUTCOMES[decide(estimate)],
            }


def _pairs(
    points: pd.DataFrame, factor: str
) -> Iterator[tuple[dict[Any, Any], dict[Any, Any], str]]:
    """Pairs of designs that differ only in the factor, in the order of its levels."""
    order = {level_text(level): i for i, level in enumerate(ordered_levels(points[factor]))}
    designs = points.drop_duplicates("design_id")
    designs = designs.assign(_place=designs[factor].map(level_text).map(order))
    designs = designs.sort_values(["_alike", "_place"], kind="stable")
    rows = designs[["design_id", "data", "ffn", "_place", "_alike", "_where", factor]]
    for _, group in groupby(rows.to_dict("records"), key=lambda row: row["_alike"]):
        for one, two in combinations(group, 2):
            if one["_place"] != two["_place"]:
                yield one, two, one["_where"]


def on_scale(name: str, values: Array) -> tuple[Array, str]:
    """The logarithm of a metric that is a ratio, in nats; any other metric unchanged."""
    metric = metric_of(name)
    if metric is None or not metric.is_ratio:
        return values, ""
    logs = np.full_like(values, np.nan)
    np.log(values, out=logs, where=values > 0)
    return logs, "nats"
