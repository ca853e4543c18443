"""Figures of groups of tokens, and of the sites around the nonlinearity.

Functions for one run take rows of `load_groups` of one FFN name and one step; functions for several
runs take rows of `pr_of_groups` of one FFN name.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nerve.analysis.groups import pr_column
from nerve.metric_names import metric_of
from nerve.report.figures_of_several_runs import layers_by_factor
from nerve.report.style import (
    COLORS,
    LEVEL_COLORS,
    NULL_COLOR,
    key,
    name_axes,
    new_figure,
    outside_legend,
    say_empty,
    scale_by_ratio,
)
from nerve.sites_and_groups import GROUP_SITES, GROUPINGS, POOLED, SITES

SHOWN = ("se", "pr", "eee")
"""The metrics of the small multiples, one per row."""

SITE_COLORS = {
    "stream_in": LEVEL_COLORS[0],
    "input": LEVEL_COLORS[1],
    **COLORS,
    "output": LEVEL_COLORS[2],
    "stream_out": LEVEL_COLORS[3],
}


COMPARED: dict[str, tuple[tuple[str, ...], ...]] = {
    "position": (("q1",), ("q4",), ("q4", "q1"), ("0", "like_0")),
    "frequency": (("head",), ("mid",), ("tail",), ("tail", "head")),
}
"""The panels of figures of several runs: a group, or the ratio of one to another. The first
position has few samples, so only its ratio to equally many others is meaningful."""


def groups_by_depth(groups: pd.DataFrame, grouping: str, title: str) -> Figure:
    """SE, PR and EEE of the groups of one grouping, layer by layer: pre on the left, post on the
    right; gray, all samples together."""
    names = [name for name in GROUPINGS[grouping] if name in set(groups["group"])]
    colors = dict(zip(names, LEVEL_COLORS, strict=False))
    figure, panels = new_figure(len(SHOWN), len(SITES), title, width=4.2, height=2.4)
    cells = [(metric, site) for metric in SHOWN for site in SITES]
    for panel, (metric, site) in zip(panels, cells, strict=True):
        own = groups[groups["site"] == site]
        whole = own[own["grouping"] == POOLED]
        _line(panel, whole, metric, color="#8C8C8C", linestyle="--")
        for name in names:
            rows = own[(own["grouping"] == grouping) & (own["group"] == name)]
            _line(panel, rows, metric, color=colors[name], marker=".")
        _finish(panel, own, metric, site)
    entries = [
        key(f"{name} (N = {_numbers(groups, grouping, name)})", color=colors[name], marker=".")
        for name in names
    ]
    outside_legend(figure, [*entries, key("all", color="#8C8C8C", linestyle="--")], n_columns=4)
    return figure


def sites_by_depth(groups: pd.DataFrame, title: str) -> Figure:
    """SE, PR, EEE and variance along the block, layer by layer: the stream before the FFN, its
    input, pre, post, its output, the stream after it."""
    rows = groups[groups["grouping"] == POOLED]
    names = [name for name in GROUP_SITES if name in set(rows["site"])]
    shown = (*SHOWN, "variance")
    figure, panels = new_figure(2, 2, title, width=4.6, height=2.8)
    for panel, metric in zip(panels, shown, strict=True):
        for name in names:
            _line(panel, rows[rows["site"] == name], metric, color=SITE_COLORS[name], marker=".")
        _finish(panel, rows, metric, "post")
    entries = [
        key(
            f"{name} (D = {rows.loc[rows['site'] == name, 'dim'].max():,})", color=SITE_COLORS[name]
        )
        for name in names
    ]
    outside_legend(figure, entries, n_columns=3)
    return figure


def groups_by_factor(
    rows: pd.DataFrame, grouping: str, factor: str, others: Sequence[str], title: str
) -> Figure:
    """PR of groups of one grouping by layer, colored by a factor's levels: pre above post. The
    groups of a site share one axis; next to them are the ratios of two groups' PR.

    Args:
        rows: rows of `pr_of_groups`, with all factors.
        grouping: one of `COMPARED`.
        factor, others, title: as in `curves_by_factor`.
    """
    shown = COMPARED[grouping]
    names = [pr_column(site, *groups) for site in SITES for groups in shown]
    rows = rows.reindex(columns=rows.columns.union(names, sort=False))
    figure = layers_by_factor(rows, factor, others, title, names, len(SITES))
    for row, site in enumerate(SITES):
        panels = figure.axes[row * len(shown) : (row + 1) * len(shown)]
        of_one = [groups for groups in shown if len(groups) == 1]
        together = pd.concat([rows[pr_column(site, *groups)] for groups in of_one])
        for panel, groups in zip(panels, shown, strict=True):
            is_ratio = groups not in of_one
            _name(panel, f"PR {site}, {' / '.join(groups)}", "ratio" if is_ratio else "directions")
            scale_by_ratio(panel, rows[pr_column(site, *groups)] if is_ratio else together)
            if is_ratio:
                panel.axhline(1, color=NULL_COLOR, linewidth=0.8)
        _share_axis(panels[: len(of_one)])
    return figure


def sites_by_factor(rows: pd.DataFrame, factor: str, others: Sequence[str], title: str) -> Figure:
    """PR along the block by layer, one panel per site, colored by a factor's levels.

    Args:
        rows: rows of `pr_of_groups`, with all factors.
        factor, others, title: as in `curves_by_factor`.
    """
    of_sites = {pr_column(site, POOLED): site for site in GROUP_SITES}
    names = [name for name in of_sites if name in rows and rows[name].notna().any()]
    figure = layers_by_factor(rows, factor, others, title, names, 2)
    for panel, name in zip(figure.axes, names, strict=False):
        _name(panel, f"PR {of_sites[name]}", "directions")
        scale_by_ratio(panel, rows[name])
    return figure


def _name(panel: Axes, title: str, unit: str) -> None:
    panel.set_title(title, fontsize=8)
    panel.set_ylabel(f"PR ({unit})", fontsize=8)


def _share_axis(panels: Sequence[Axes]) -> None:
    low, high = zip(*(panel.get_ylim() for panel in panels), strict=True)
    for panel in panels:
        panel.set_ylim(min(low), max(high))


def _line(panel: Axes, rows: pd.DataFrame, metric: str, **style: Any) -> None:
    ordered = rows.sort_values("layer")
    panel.plot(ordered["layer"], ordered[metric], linewidth=1.2, **style)


def _finish(panel: Axes, rows: pd.DataFrame, metric: str, site: str) -> None:
    column = f"{metric}_{site}"
    name_axes(panel, "layer", column, f"{metric.upper() if metric in SHOWN else metric} {site}")
    if metric == "variance" or rows["site"].nunique() > len(SITES):
        panel.set_title(metric.upper() if metric in SHOWN else metric, fontsize=8)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if rows[metric].isna().all():
        say_empty(panel)
    known = metric_of(column)
    if known is not None and known.is_ratio:
        scale_by_ratio(panel, rows[metric])


def _numbers(groups: pd.DataFrame, grouping: str, name: str) -> str:
    """The number of samples of a group: one number, or a range."""
    counts = groups.loc[(groups["grouping"] == grouping) & (groups["group"] == name), "n_samples"]
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
