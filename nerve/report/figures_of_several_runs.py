"""Figures of several runs: curves and layers colored by a factor, and the loss against metrics.

Each function takes rows of the comparisons, for one FFN name and runs that can be compared, and
returns a matplotlib `Figure`. The seeds of a design are one line: their mean, with a band from the
lowest to the highest if there are two or more. With more than 40 designs, only the median of each
level is drawn, with a band from the 10th to the 90th percentile of the designs; with more than 40
lines, without bands. Medians are computed separately for each `data`, and only at the steps or
layers that the largest number of its designs have, because a varying set of designs would make a
line rise and fall.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nerve.analysis.factors import levels_of, ordered_levels
from nerve.metric_names import View, columns_of, metric_of, shown_in
from nerve.report.style import (
    DASHES,
    FLAGGED_COLOR,
    key,
    level_colors,
    level_keys,
    name_axes,
    new_figure,
    outside_legend,
    plain_text,
    say_empty,
    scale_by_ratio,
    short_name,
)
from nerve.sites_and_groups import SITES

MAX_LINES = 40


def _split(view: View) -> tuple[list[str], list[str], list[str]]:
    """The columns shown in a view: those of pre, those of post, and those without a site."""
    metrics = shown_in(view)
    pre, post = ([metric.at(site) for metric in metrics if metric.has_sites] for site in SITES)
    return pre, post, [metric.column for metric in metrics if not metric.has_sites]


def _curves() -> tuple[str, ...]:
    pre, post, others = _split("curves")
    return ("val_loss", *pre, *others, *post)


def _scattered() -> tuple[str, ...]:
    pre, post, others = _split("scatter")
    return (*pre, *others[0::2], *post, *others[1::2])


CURVES = _curves()
"""The panels of `curves_by_factor` in two rows: pre above post."""
LAYERS = columns_of(lambda metric: "layers" in metric.shown)
SCATTERED = _scattered()
"""The panels of `loss_against_metrics` in two rows."""


def curves_by_factor(means: pd.DataFrame, factor: str, others: Sequence[str], title: str) -> Figure:
    """Validation loss and metrics (means over layers) over steps, colored by a factor's levels.

    Args:
        means: rows of `depth_means` of one region with `CURVES` and all factors.
        factor: the column that determines the color.
        others: the other factors that vary; if they have at most four combinations, these determine
            the dashes, otherwise they are not distinguished.
        title: the figure's title.
    """
    figure, panels = _in_rows(2, len(CURVES), title)
    rows, entries = _styled(means, factor, others)
    _draw_lines(panels, CURVES, rows, "step")
    outside_legend(figure, entries, plain_text(factor))
    return figure


def layers_by_factor(
    layers: pd.DataFrame,
    factor: str,
    others: Sequence[str],
    title: str,
    names: Sequence[str] = LAYERS,
    n_rows: int = 1,
) -> Figure:
    """PR_pre, PR_post and their ratio by layer, colored by a factor's levels; or other columns.

    Args:
        layers: rows of `metrics_by_depth` at one step per run, with `names` and all factors. Runs
            with different numbers of layers are drawn over relative depth.
        factor, others, title: as in `curves_by_factor`.
        names: the columns, one panel each.
        n_rows: number of rows of panels.
    """
    figure, panels = _in_rows(n_rows, len(names), title, width=4.0, height=2.9)
    rows, entries = _styled(layers, factor, others)
    n_layers = layers.groupby("run_id")["layer"].max()
    x = "layer" if n_layers.nunique() == 1 else "depth"
    _draw_lines(panels, names, rows, x, marker=".")
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(integer=x == "layer"))
    outside_legend(figure, entries, plain_text(factor))
    return figure


def loss_against_metrics(
    points: pd.DataFrame, correlations: pd.DataFrame, factor: str | None, title: str
) -> Figure:
    """Final validation loss against each metric, one point per design, with the correlation.

    Points are means over seeds, with bars of ± one SD (n - 1) if there are two or more seeds (and
    at most 40 designs). A design whose runs are all flagged has no point. The title of a panel has
    Pearson's r with its 95% interval, Spearman's ρ, and the number of designs.

    Args:
        points: rows of `average_seeds` of `final_metrics`, of one `data`.
        correlations: rows of `correlate_across_runs` of these points.
        factor: the column that determines the color; None for a single color.
        title: the figure's title.
    """
    figure, panels = _in_rows(2, len(SCATTERED), title, height=2.8)
    levels = levels_of(points[factor]) if factor else pd.Series("", index=points.index)
    colors = level_colors(ordered_levels(points[factor])) if factor else {"": "#000000"}
    by_metric = correlations.set_index("metric")
    for panel, name in zip(panels, SCATTERED, strict=True):
        shown = points[[name, "val_loss"]].notna().all(axis=1)
        for level, rows in points[shown].groupby(levels[shown], sort=False):
            panel.errorbar(
                rows["val_loss"],
                rows[name],
                xerr=_bars(rows, "val_loss", len(points)),
                yerr=_bars(rows, name, len(points)),
                fmt="o",
                markersize=4 if len(points) <= MAX_LINES else 2.5,
                linewidth=0.8,
                color=colors[str(level)],
            )
        if not shown.any():
            say_empty(panel, "no run with this metric and a loss")
        name_axes(panel, "val_loss", name, f"{short_name(name)}\n{_coefficients(by_metric, name)}")
        panel.xaxis.set_major_locator(MaxNLocator(5))
    if factor:
        entries = level_keys(colors, marker="o", linestyle="none", markersize=4)
        outside_legend(figure, entries, plain_text(factor))
    return figure


def _in_rows(n_rows: int, n: int, title: str, **size: float) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels in rows."""
    figure, panels = new_figure(n_rows, -(-n // n_rows), title, **size)
    for panel in panels[n:]:
        panel.remove()
    return figure, panels[:n]


def _styled(
    rows: pd.DataFrame, factor: str, others: Sequence[str]
) -> tuple[pd.DataFrame, list[Line2D]]:
    """The rows with the name of their line and its `color` and `dash`, and the legend's entries."""
    levels = levels_of(rows[factor])
    colors = level_colors(ordered_levels(rows[factor]))
    entries = level_keys(colors)
    # The same design on other data is a separate line.
    design = rows["design_id"].str.cat(rows["data"].fillna(""), sep=" ")
    many = design.nunique() > MAX_LINES
    if many:
        combination = "data " + rows["data"].fillna("unknown").astype(str)
    else:
        texts = [[f"{name} = {level}" for level in levels_of(rows[name])] for name in others]
        named = [", ".join(row) for row in zip(*texts, strict=True)] if others else ""
        combination = pd.Series(named, index=rows.index)
    combinations = sorted(combination.unique())
    dashes = dict.fromkeys(combinations, DASHES[0])
    if 1 < len(combinations) <= len(DASHES):
        dashes = dict(zip(combinations, DASHES, strict=False))
        entries += [
            key(plain_text(text), color=FLAGGED_COLOR, linestyle=dash)
            for text, dash in dashes.items()
        ]
    styled = rows.assign(
        design=design,
        line=levels.str.cat(combination, sep=" ") if many else design,
        color=levels.map(colors),
        dash=combination.map(dashes),
    )
    return styled, entries


def _draw_lines(
    panels: Sequence[Axes], names: Sequence[str], rows: pd.DataFrame, x: str, marker: str = ""
) -> None:
    """Draws a line per design (or level) with its band in each panel, and labels the axes."""
    centers, lows, highs = _summaries(rows, x, names)
    styles = rows.drop_duplicates("line")
    for line, color, dash in zip(styles["line"], styles["color"], styles["dash"], strict=True):
        for panel, name in zip(panels, names, strict=True):
            center, low, high = (frame.loc[line, name] for frame in (centers, lows, highs))
            if name == "val_loss":  # a run need not be evaluated at every measured step
                center, low, high = (each[center.notna()] for each in (center, low, high))
            panel.plot(
                center.index,
                center,
                color=color,
                linestyle=dash,
                marker=marker or ("." if len(center) == 1 else ""),
                linewidth=1.3,
            )
            if len(styles) <= MAX_LINES:
                panel.fill_between(center.index, low, high, color=color, alpha=0.15, linewidth=0)
    for panel, name in zip(panels, names, strict=True):
        name_axes(panel, x, name, short_name(name))
        metric = metric_of(name)
        if metric is not None and metric.is_ratio:
            scale_by_ratio(panel, rows[name])
        if rows[name].isna().all():
            say_empty(panel)


def _summaries(rows: pd.DataFrame, x: str, names: Sequence[str]) -> tuple[pd.DataFrame, ...]:
    """Center, lower and upper edge of the band by line and x, as the module docstring says."""
    if (rows["line"] == rows["design"]).all():
        seeds = rows.groupby(["line", x])[list(names)]
        return seeds.mean(), seeds.min(), seeds.max()
    points = rows.groupby(["line", x, "design"])[list(names)].mean()
    n_designs = points[names[0]].groupby(level=["line", x]).transform("size")
    is_common = n_designs == n_designs.groupby(level="line").transform("max")
    designs = points[is_common].groupby(level=["line", x])
    return designs.median(), designs.quantile(0.1), designs.quantile(0.9)


def _bars(rows: pd.DataFrame, name: str, n_points: int) -> np.ndarray | None:
    if n_points > MAX_LINES:
        return None
    spread = rows[f"{name}_sd"].astype(float)
    return None if spread.isna().all() else spread.fillna(0).to_numpy()


def _coefficients(by_metric: pd.DataFrame, name: str) -> str:
    if name not in by_metric.index:
        return ""
    row: Any = by_metric.loc[name]
    interval = ""
    if pd.notna(row["pearson_low"]):
        interval = f" [{_signed(row['pearson_low'])}, {_signed(row['pearson_high'])}]"
    pearson, spearman = _signed(row["pearson"]), _signed(row["spearman"])
    return f"r {pearson}{interval}, ρ {spearman}, n {int(row['n'])}"


def _signed(value: Any) -> str:
    return "–" if pd.isna(value) else f"{value:+.2f}".replace("-", "−")
