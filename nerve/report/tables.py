"""The tables of a report on several runs: runs, designs, correlations and other comparisons."""

from collections.abc import Sequence

import pandas as pd

from nerve.analysis.compare import average_seeds, metrics_at_loss
from nerve.analysis.correlate import NULLS, RESULTS
from nerve.analysis.depth import metrics_by_depth
from nerve.analysis.factors import Factors, level_text, levels_of, ordered_levels
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
        window: the window that the summary of correlations within runs shows first, one of
            `WINDOWS`.
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
        "One row per run: its factors, how it ended and its loss; data identifies its corpus and "
        "tokenizer.",
        _by_level(pd.concat([own, judged], axis=1), (*factors.varying, "seed")),
        [
            *("run_id", "sweep", "flag", *factors.varying, "seed", "final_loss", "min_loss"),
            *(*results, "n_steps", "n_null", "run_status", "reason", "error", "directory"),
        ],
    )


def _by_level(rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """The rows in the order of the levels of their factors, as in legends."""
    if not factors:
        return rows
    places = pd.DataFrame(index=rows.index)
    for name in factors:
        order = {level_text(level): i for i, level in enumerate(ordered_levels(rows[name]))}
        places[name] = levels_of(rows[name]).map(order)
    return rows.loc[places.sort_values(list(factors), kind="stable").index]


def _tables_of_designs(
    runs: pd.DataFrame, metrics: pd.DataFrame, designs: pd.DataFrame, factors: Factors
) -> list[Table]:
    shown = (*factors.varying, "ffn")
    return [
        Table(
            "designs",
            "The last measured step: means over layers and over the seeds of a design, without "
            "flagged runs; _sd: sample SD over seeds.",
            _by_level(designs, factors.varying),
            (*shown, *SHOWN_LOSS, *known(designs, SHOWN), "n_null"),
        ),
        Table(
            "equal_loss",
            "The same at the point where each run's validation loss crosses the target, "
            "interpolated between measured steps. The target is the highest final loss of all "
            "comparable runs on the same data.",
            _by_level(
                average_seeds(metrics_at_loss(metrics, runs, factors.varying)), factors.varying
            ),
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
            "Correlation of the final metric with the final validation loss across designs (means "
            "over seeds) and across runs (each seed is a point), with 95% intervals. r_: "
            "correlation of the loss with the clock, log(step + 1), and with each numeric factor; "
            "given_: partial correlation given it.",
            pd.concat(across),
            ("points", *across[0].columns.drop("points")),
        ),
        Table(
            "within_summary",
            "Correlation of metric and validation loss over the measured steps of each comparable "
            "run: distribution over runs. Windows: all steps; after the warm-up; changes between "
            "consecutive measured steps, which a common trend does not affect. r_clock and r_lr: "
            "correlation of the loss with log(step + 1) and with the learning rate; given_: "
            "partial correlation given each of these; n_beyond_: number of runs in which its 95% "
            "interval excludes 0.",
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
            "loss so far (partial τ), with 95% intervals; null: the partial τ that a noisy copy of "
            "the loss would have.",
            compared.early,
        ),
        Table(
            "contrasts",
            "Designs that differ in one factor only, with runs paired by seed: level minus other, "
            "with the 95% interval; the error (sd, of one run) is pooled over all designs of one "
            "scale. n_higher: pairs in which level is higher. With fewer than 3 degrees of freedom "
            "(df), the outcome is undecided.",
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
        "Number of used dimensions as a function of the FFN's width: metric = coefficient · "
        "d_ff^exponent, with the 95% interval of the exponent; n counts widths."
    )
    return [Table("scaling", caption, fits)] if len(fits) else []


def _summary(within: pd.DataFrame, window: str) -> pd.DataFrame:
    """The median, lowest and highest coefficients of comparable runs; `window` comes first."""
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
