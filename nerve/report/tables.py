"""The tables of a report on several runs: the runs, what they come to, and how it goes together."""

import pandas as pd

from nerve.analysis.compare import average_seeds, metrics_at_loss
from nerve.analysis.correlate import NULLS, RESULTS
from nerve.analysis.depth import metrics_by_depth
from nerve.analysis.factors import Factors
from nerve.analysis.frames import at_last_step
from nerve.analysis.scaling import fit_width_scaling
from nerve.metric_names import columns_of
from nerve.report.comparisons import Comparisons
from nerve.report.content import Table, known

SHOWN_LOSS = ("n_seeds", "n_flagged", "val_loss", "val_loss_sd")
RUN_RESULTS = ("final.bits_per_byte", "final.val_accuracy", "n_parameters")
WIDTHS = ("ffn.width", "ffn.d_ff")
SHOWN = columns_of(lambda metric: metric.compared and "tables" in metric.shown)
"""The metrics in the tables of several runs."""


def comparison_tables(compared: Comparisons, window: str) -> list[Table]:
    """All tables on two or more runs.

    Args:
        compared: the comparisons of the runs.
        window: the steps that the summary of correlations within runs starts with, of `WINDOWS`.
    """
    loaded, factors = compared.loaded, compared.factors
    runs, metrics = loaded.frame, loaded.metrics
    tables = [
        _table_of_runs(runs, loaded.flags, factors),
        *_tables_of_designs(runs, metrics, compared.designs, factors),
        *_correlations(compared, window),
        *_tables_of_comparisons(compared),
        _table_of_layers(runs, metrics, factors),
    ]
    if compared.points["d_ff"].nunique() > 1:
        tables += _scaling(compared)
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
            "The same where each run's validation loss passes the target, interpolated between "
            "measured steps: the highest at which a comparable run on the same data ends.",
            average_seeds(metrics_at_loss(metrics, runs, factors.varying)),
            [
                *(*shown, "target_loss", "reached", "step", *SHOWN_LOSS),
                *known(designs, SHOWN),
            ],
        ),
    ]


def _correlations(compared: Comparisons, window: str) -> list[Table]:
    across = [
        frame.assign(points=unit)
        for unit, frame in (("designs", compared.across_designs), ("runs", compared.across_runs))
    ]
    within = compared.within
    return [
        Table(
            "across",
            "Correlation of final metric and final validation loss across designs (means over "
            "seeds) and across runs (each seed a point), with 95% intervals. r_: of the loss with "
            "the clock, log(step + 1), and with each factor that is a number; given_: what is left "
            "of r given it.",
            pd.concat(across),
            ("points", *across[0].columns.drop("points")),
        ),
        Table(
            "within_summary",
            "Correlation of metric and validation loss within each comparable run, over its "
            "measured steps: how these lie over runs. Windows: all steps; after the warm-up; "
            "changes from one measured step to the next, which shared trend does not move. "
            "r_clock and r_lr: of the loss with log(step + 1) and with the learning rate; given_: "
            "what is left of r given these, and in how many runs its 95% interval leaves out 0.",
            _summary(within, window),
        ),
        Table(
            "within",
            "The correlations within runs, run by run.",
            within,
            [
                *("run_id", "seed", *compared.factors.varying, "flag", "ffn", "metric", "window"),
                *RESULTS,
            ],
        ),
    ]


def _tables_of_comparisons(compared: Comparisons) -> list[Table]:
    tables = [
        Table(
            "early",
            "Kendall's τ with the final loss at each measured step, over comparable runs of one "
            "schedule and budget: of each metric, of the loss so far, and of the metric given the "
            "loss so far (partial τ), with 95% intervals; null: what the partial τ of a noisy copy "
            "of the loss would be.",
            compared.early,
        ),
        Table(
            "contrasts",
            "Designs that differ in one factor alone, runs paired by seed: level less other, with "
            "the 95% interval; the error (sd, of one run) is pooled over all designs of one scale. "
            "n_higher: pairs in which level is higher. Less than 3 degrees of freedom (df) decide "
            "nothing.",
            compared.contrasts,
        ),
    ]
    return [table for table in tables if len(table.frame)]


def _table_of_layers(runs: pd.DataFrame, metrics: pd.DataFrame, factors: Factors) -> Table:
    layers = metrics_by_depth(at_last_step(metrics), runs, factors.varying, names=SHOWN)
    return Table(
        "layers",
        "The last measured step of each run, layer by layer.",
        layers,
        in_page=False,
    )


def _scaling(compared: Comparisons) -> list[Table]:
    by = [name for name in compared.factors.varying if name not in WIDTHS]
    fits = fit_width_scaling(compared.points, by)
    fits = fits[fits["n"] > 1]
    caption = (
        "Dimensions used against the width of the FFN: metric = coefficient · d_ff^exponent, "
        "with the 95% interval of the exponent; n counts widths."
    )
    return [Table("scaling", caption, fits)] if len(fits) else []


def _summary(within: pd.DataFrame, window: str) -> pd.DataFrame:
    """How the coefficients of comparable runs lie: median, lowest, highest; the window's first."""
    rows = within[within["flag"] == "ok"]
    columns = {
        "n_runs": ("pearson", "count"),
        "pearson_median": ("pearson", "median"),
        "pearson_min": ("pearson", "min"),
        "pearson_max": ("pearson", "max"),
        "spearman_median": ("spearman", "median"),
    }
    for null in NULLS:
        low, high = rows[f"given_{null}_low"], rows[f"given_{null}_high"]
        rows = rows.assign(**{f"beyond_{null}": (low > 0) | (high < 0)})
        columns |= {
            f"r_{null}_median": (f"r_{null}", "median"),
            f"given_{null}_median": (f"given_{null}", "median"),
            f"n_intervals_{null}": (f"given_{null}_low", "count"),
            f"n_beyond_{null}": (f"beyond_{null}", "sum"),
        }
    groups = rows.groupby(
        ["data", "ffn", "metric", "window"], sort=False, dropna=False, observed=True
    )
    summary = groups.agg(**columns).reset_index()
    return summary.sort_values("window", key=lambda names: names != window, kind="stable")
