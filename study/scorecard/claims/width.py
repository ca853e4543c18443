"""Claims 4 and 5: do the metrics follow the loss, within a run and across widths?"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep
from judgement import Check, Finding, Table, outcome
from wording import coefficient, interval, label, number

from nerve import average_seeds, correlate_across_runs, correlate_within_runs

FOUR = ("se_pre", "se_post", "pr_pre", "pr_post")
PRELN = "layernorm gelu"
NORMFREE = "none relu"
DESIGNS = {PRELN: "PreLN GELU", NORMFREE: "norm-free ReLU"}
RATES = {PRELN: 1e-3, NORMFREE: 5e-4}
"""At which a design is compared: that of the sweep, or a lower one where that lost widths."""

ACTIVATIONS = {"gelu": "GELU", "relu": "ReLU", "identity": "identity, the control"}
WITHIN = {
    "se_pre": "-0.98 to -0.99",
    "se_post": "-0.84 to -0.87",
    "pr_pre": "-0.97 to -0.99",
    "pr_post": "-0.85 to -0.95",
}
ACROSS = {
    PRELN: {"se_pre": "-0.99", "se_post": "-1.00", "pr_pre": "-0.99", "pr_post": "-1.00"},
    NORMFREE: {"se_pre": "0.03", "se_post": "-0.99", "pr_pre": "-0.55", "pr_post": "-0.94"},
}
LATE_LIMIT = -0.8
CHANGES_LIMIT = -0.5
ACROSS_LIMIT = -0.9


def within_runs(evidence: Evidence) -> Finding:
    """Claim 4: r of metric and loss over the steps of a run, in three windows."""
    sweep = at_their_rates(evidence.sweep("ffn_width_gpu"))
    table = _within(sweep)
    own = table[table["level"] == PRELN]
    late = own[own["window"] == "after_warmup"].groupby("metric")["pearson"]
    medians = late.median().reindex(FOUR).dropna()
    changes = own[own["window"] == "differences"].groupby("metric")["pearson"].median()
    changes = changes.reindex(FOUR).dropna()
    checks = [
        Check(
            f"{label(name)}: median r after warm-up ≤ {LATE_LIMIT}",
            WITHIN[name],
            _median(late.get_group(name)) if name in medians else "–",
            outcome(medians[name] <= LATE_LIMIT) if name in medians else "not run",
        )
        for name in FOUR
    ]
    checks.append(
        Check(
            f"first differences: median r ≤ {CHANGES_LIMIT} for each of the four",
            "–",
            ", ".join(f"{label(name)} {value:.2f}" for name, value in changes.items()) or "–",
            outcome((changes <= CHANGES_LIMIT).all()) if len(changes) else "not run",
        )
    )
    measured = ", ".join(f"{label(name)} {value:.2f}" for name, value in medians.items())
    only = sweep.where(sweep.runs["level"] == PRELN)
    tables = [_windows(table, DESIGNS)]
    if evidence.has(["activation_gpu"]):
        activations = evidence.sweep("activation_gpu")
        same_size = activations.where(activations.runs["model.d_model"] == 512)
        tables.append(_windows(_within(same_size.by("activation.name")), ACTIVATIONS))
    tables.append(_in_how_many(evidence))
    return Finding.of(f"median r: {measured}", only, checks, tables)


def across_widths(evidence: Evidence) -> Finding:
    """Claim 5: r of final metric and final loss over widths, with 95% intervals."""
    everything = _named(evidence.sweep("ffn_width_gpu"))
    sweep = at_their_rates(everything)
    designs = average_seeds(everything.points)
    all_rates = correlate_across_runs(designs, ["level", "optimizer.lr"], names=FOUR)
    compared = all_rates["optimizer.lr"] == all_rates["level"].map(RATES)
    table = all_rates[compared].set_index(["level", "metric"])
    checks = [_across(table, PRELN, name) for name in FOUR]
    checks += [_across(table, NORMFREE, name) for name in ("se_post", "pr_post")]
    pre = [_row(table, NORMFREE, name) for name in ("se_pre", "pr_pre")]
    decided = all(np.isfinite(row["pearson"]) for row in pre)
    checks.append(
        Check(
            f"norm-free ReLU: r of SE_pre and of PR_pre > {ACROSS_LIMIT}",
            ", ".join(ACROSS[NORMFREE][name] for name in ("se_pre", "pr_pre")),
            ", ".join(_with_interval(row) for row in pre),
            outcome(all(row["pearson"] > ACROSS_LIMIT for row in pre)) if decided else "not run",
        )
    )
    measured = "; ".join(
        f"{DESIGNS[level]} "
        + ", ".join(
            f"{label(name)} {coefficient(_row(table, level, name)['pearson'])}" for name in FOUR
        )
        for level in DESIGNS
    )
    tables = [_coefficients(all_rates), _by_width(everything)]
    return Finding.of(f"r: {measured}", sweep, checks, tables)


def at_their_rates(sweep: Sweep) -> Sweep:
    """The runs that are compared, with their design as level."""
    sweep = _named(sweep)
    return sweep.where(sweep.runs["optimizer.lr"] == sweep.runs["level"].map(RATES))


def _named(sweep: Sweep) -> Sweep:
    return sweep.by("normalization.kind", "activation.name")


def _median(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"


def _within(sweep: Sweep) -> pd.DataFrame:
    table = correlate_within_runs(sweep.metrics, sweep.runs, ["level"], names=FOUR)
    return table[table["flag"] == "ok"]


def _windows(table: pd.DataFrame, designs: Mapping[str, str]) -> Table:
    windows = list(dict.fromkeys(table["window"]))
    cells = table.groupby(["level", "metric", "window"])["pearson"]
    rows = [
        [
            design,
            label(name),
            *(_median(cells.get_group((level, name, window))) for window in windows),
        ]
        for level, design in designs.items()
        for name in FOUR
        if (level, name, windows[0]) in cells.groups
    ]
    n_runs = table.groupby("level")["run_id"].nunique()
    counts = ", ".join(
        f"{n_runs[level]} of {design}" for level, design in designs.items() if level in n_runs
    )
    return Table(
        "r of metric (mean over layers) and validation loss over the measured steps of a run: "
        f"median (lowest to highest) over runs, {counts}",
        ["design", "metric", *map(label, windows)],
        rows,
    )


def _in_how_many(evidence: Evidence) -> Table:
    """Of every sweep of GPTs."""
    rows = []
    for name in evidence.names:
        sweep = evidence.sweep(name)
        if not evidence.has([name]) or set(sweep.runs["model.kind"]) != {"gpt"}:
            continue
        table = correlate_within_runs(sweep.metrics, sweep.runs, names=FOUR)
        table = table[(table["flag"] == "ok") & (table["window"] == "after_warmup")]
        follow = table.pivot(index="run_id", columns="metric", values="pearson") <= LATE_LIMIT
        counts = [*(follow[metric].sum() for metric in FOUR), follow.all(axis=1).sum()]
        rows.append([name, sweep.scale(), str(len(follow)), *map(str, counts)])
    return Table(
        f"Number of runs in which r after the warm-up is ≤ {LATE_LIMIT}",
        ["sweep", "scale", "runs", *map(label, FOUR), "all four"],
        rows,
    )


def _row(table: pd.DataFrame, level: str, name: str) -> dict[str, float]:
    if (level, name) not in table.index:
        return dict.fromkeys(("pearson", "pearson_low", "pearson_high"), np.nan)
    return table.loc[(level, name)].to_dict()


def _with_interval(row: dict[str, float]) -> str:
    return interval(row["pearson"], row["pearson_low"], row["pearson_high"])


def _across(table: pd.DataFrame, level: str, name: str) -> Check:
    row = _row(table, level, name)
    return Check(
        f"{DESIGNS[level]}: r of {label(name)} ≤ {ACROSS_LIMIT}",
        ACROSS[level][name],
        _with_interval(row),
        outcome(row["pearson"] <= ACROSS_LIMIT) if np.isfinite(row["pearson"]) else "not run",
    )


def _coefficients(table: pd.DataFrame) -> Table:
    rows = [
        [
            DESIGNS[row["level"]],
            f"{row['optimizer.lr']:g}",
            label(row["metric"]),
            _with_interval(row),
            coefficient(row["spearman"]),
            str(row["n"]),
        ]
        for row in table.to_dict("records")
    ]
    return Table(
        "Correlation of final metric and final loss over the widths that can be compared",
        ["design", "learning rate", "metric", "Pearson's r", "Spearman's r", "widths"],
        rows,
    )


def _by_width(sweep: Sweep) -> Table:
    order = ["level", "optimizer.lr", "ffn.width"]
    rows = [
        [
            DESIGNS[run["level"]],
            f"{run['optimizer.lr']:g}",
            f"{float(run['ffn.width']):g}",
            number(run["val_loss"], 4),
            *(number(run[name]) for name in FOUR),
            run["flag"],
        ]
        for _, run in sweep.points.sort_values(order).iterrows()
    ]
    return Table(
        "Every run at its last step, including those that cannot be compared (flag); metrics are "
        "means over layers",
        ["design", "learning rate", "width", "loss", *map(label, FOUR), "flag"],
        rows,
    )
