"""The tables of a report on several runs: the runs, what they come to, and how it goes together."""

import pandas as pd

from nerve.analysis.compare import average_seeds, metrics_at_loss
from nerve.analysis.correlate import correlate_across_runs, correlate_within_runs
from nerve.analysis.depth import metrics_by_depth
from nerve.analysis.factors import Factors
from nerve.analysis.load import Runs
from nerve.analysis.scaling import fit_width_scaling
from nerve.metric_names import columns_of
from nerve.report.content import Table, known

SHOWN_LOSS = ("n_seeds", "n_flagged", "val_loss", "val_loss_sd")
RUN_RESULTS = ("final.bits_per_byte", "final.val_accuracy", "n_parameters")
WIDTHS = ("ffn.width", "ffn.d_ff")
SHOWN = columns_of(lambda metric: metric.compared and "tables" in metric.shown)
"""The metrics in the tables of several runs."""


def comparison_tables(
    loaded: Runs, points: pd.DataFrame, factors: Factors, window: str
) -> list[Table]:
    """All tables on two or more runs.

    Args:
        loaded: the runs.
        points: rows of `final_metrics` with the factors that vary.
        factors: what varies among the runs.
        window: the steps that the summary of correlations within runs starts with, of `WINDOWS`.
    """
    runs, metrics = loaded.frame, loaded.metrics
    designs = average_seeds(points)
    tables = [
        _table_of_runs(runs, loaded.flags, factors),
        *_tables_of_designs(runs, metrics, designs, factors),
        *_correlations(runs, metrics, points, designs, factors, window),
        _table_of_layers(runs, metrics, factors),
    ]
    by = [name for name in factors.varying if name not in WIDTHS]
    fits = fit_width_scaling(points, by)
    fits = fits[fits["n"] > 1]
    if len(fits):
        caption = (
            "Dimensions used against the width of the FFN: metric = coefficient · d_ff^exponent, "
            "with the 95% interval of the exponent; n counts widths."
        )
        tables.append(Table("scaling", caption, fits))
    return tables


def _table_of_runs(runs: pd.DataFrame, flags: pd.DataFrame, factors: Factors) -> Table:
    results = [name for name in RUN_RESULTS if name in runs.columns and runs[name].notna().any()]
    judged = flags[["flag", "reason", "final_loss", "min_loss", "n_steps", "n_null", "data"]]
    own = runs.drop(columns=judged.columns, errors="ignore")
    return Table(
        "runs",
        "One row per run: its factors, how it ended and its loss; data stands for its corpus and "
        "tokenizer.",
        pd.concat([own, judged], axis=1),
        [
            *("run_id", "sweep", "flag", *factors.varying, "seed", "final_loss", "min_loss"),
            *(*results, "n_steps", "n_null", "run_status", "reason", "error", "directory"),
        ],
    )


def _tables_of_designs(
    runs: pd.DataFrame, metrics: pd.DataFrame, designs: pd.DataFrame, factors: Factors
) -> list[Table]:
    shown = (*factors.varying, "ffn")
    return [
        Table(
            "designs",
            "The last measured step, means over layers and over the seeds of a design, without "
            "flagged runs; _sd: sample SD over seeds.",
            designs,
            (*shown, *SHOWN_LOSS, *known(designs, SHOWN), "n_null"),
        ),
        Table(
            "equal_loss",
            "The same at the first measured step at which each run's validation loss is at or "
            "below the target: the lowest that all comparable runs on the same data reach.",
            average_seeds(metrics_at_loss(metrics, runs, factors.varying)),
            [
                *(*shown, "target_loss", "reached", "step", *SHOWN_LOSS),
                *known(designs, SHOWN),
            ],
        ),
    ]


def _correlations(
    runs: pd.DataFrame,
    metrics: pd.DataFrame,
    points: pd.DataFrame,
    designs: pd.DataFrame,
    factors: Factors,
    window: str,
) -> list[Table]:
    across = [
        correlate_across_runs(frame).assign(points=unit)
        for unit, frame in (("designs", designs), ("runs", points))
    ]
    within = correlate_within_runs(metrics, runs, factors.varying)
    return [
        Table(
            "across",
            "Correlation of final metric and final validation loss across designs (means over "
            "seeds) and across runs (each seed a point), with 95% intervals.",
            pd.concat(across),
            ("points", *across[0].columns.drop("points")),
        ),
        Table(
            "within_summary",
            "Correlation of metric and validation loss within each comparable run, over its "
            "measured steps: how these lie over runs. Windows: all steps; after the warm-up; "
            "changes from one measured step to the next, which shared trend does not move.",
            _summary(within, window),
        ),
        Table(
            "within",
            "The correlations within runs, run by run.",
            within,
            [
                *("run_id", "seed", *factors.varying, "flag", "ffn", "metric", "window"),
                *("n", "pearson", "spearman"),
            ],
        ),
    ]


def _table_of_layers(runs: pd.DataFrame, metrics: pd.DataFrame, factors: Factors) -> Table:
    layers = metrics_by_depth(metrics, runs, factors.varying, names=SHOWN)
    last = layers.groupby("run_id", observed=True)["step"].transform("max")
    return Table(
        "layers",
        "The last measured step of each run, layer by layer.",
        layers[layers["step"] == last],
        in_page=False,
    )


def _summary(within: pd.DataFrame, window: str) -> pd.DataFrame:
    """How the coefficients of comparable runs lie: median, lowest, highest; the window's first."""
    rows = within[within["flag"] == "ok"]
    groups = rows.groupby(["data", "ffn", "metric", "window"], sort=False, dropna=False)
    summary = groups.agg(
        n_runs=("pearson", "count"),
        pearson_median=("pearson", "median"),
        pearson_min=("pearson", "min"),
        pearson_max=("pearson", "max"),
        spearman_median=("spearman", "median"),
    ).reset_index()
    return summary.sort_values("window", key=lambda names: names != window, kind="stable")
