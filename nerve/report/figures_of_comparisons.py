"""Figures of comparisons: correlations and null models, early ranking, contrasts.

Each function takes rows of one comparison and returns a matplotlib `Figure`. Filled points have an
interval that excludes 0; the intervals of hollow ones include 0 or do not exist.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nerve.analysis.factors import as_number
from nerve.metric_names import metric_of
from nerve.report.style import (
    COLORS,
    LOSS_COLOR,
    NULL_COLOR,
    axis_label,
    key,
    new_figure,
    outside_legend,
    plain_text,
    say_empty,
    short_name,
)

MAX_INTERVALS = 12
"""With more runs, points are drawn without their intervals."""

MAX_CONTRASTS = 24
MAX_LEVELS = 3
"""With more levels, not all pairs are drawn."""

LINE_STYLES = ("--", ":", "-.", (0, (6, 2, 1, 2)))


def beside_nulls(
    correlations: pd.DataFrame, nulls: Sequence[str], names: dict[str, str], title: str
) -> Figure:
    """r of each metric with the loss, compared with that of null models, and the partial r given
    each null model.

    The left panel shows r, one point per row, and the null models' r as lines (the median if there
    are several rows): a metric on a line predicts the loss as well as the null model does. The
    other panels show the partial r, with its interval if there are few rows.

    Args:
        correlations: rows of `correlate_within_runs` of one window, or of `correlate_across_runs`.
        nulls: up to four with a column `r_<null>`, such as `clock`; one that does not vary has no
            line and no panel.
        names: the names of the null models in the figure.
        title: the figure's title.
    """
    nulls = [null for null in nulls if correlations[f"r_{null}"].notna().any()]
    metrics = list(dict.fromkeys(correlations["metric"]))
    height = 1.0 + 0.28 * len(metrics)
    figure, panels = new_figure(1, 1 + len(nulls), title, width=3.6, height=height)
    places = {metric: len(metrics) - 1 - i for i, metric in enumerate(metrics)}
    shifts = _shifts(correlations)
    rows = correlations["metric"].map(places) + shifts
    few = correlations.groupby("metric", sort=False).size().max() <= MAX_INTERVALS
    ends = ("pearson_low", "pearson_high")
    has_ends = few and set(ends) <= set(correlations.columns)
    low, high = (correlations[end] if has_ends else None for end in ends)
    _points(panels[0], correlations["pearson"], rows, low, high, "#000000")
    panels[0].set_xlabel("r of metric and loss", fontsize=8)
    entries = [key("r of a metric", color="#000000", marker="o", linestyle="none", markersize=4)]
    for null, style in zip(nulls, LINE_STYLES[: len(nulls)], strict=True):
        own = correlations[f"r_{null}"].median()
        for sign in (-1, 1):
            panels[0].axvline(sign * own, color=COLORS["post"], linestyle=style, linewidth=1)
        entries.append(key(f"± r of {names[null]}", color=COLORS["post"], linestyle=style))
    for panel, null in zip(panels[1:], nulls, strict=True):
        given = correlations[f"given_{null}"]
        low, high = (correlations[f"given_{null}_{end}"] for end in ("low", "high"))
        _points(panel, given, rows, low, high, COLORS["pre"], with_bars=few)
        panel.set_xlabel(f"partial r given {plain_text(names[null])}", fontsize=8)
        if given.isna().all():
            say_empty(panel, "no residual variation, or too few points")
    for panel in panels:
        panel.axvline(0, color=NULL_COLOR, linewidth=0.8)
        panel.set_xlim(-1.05, 1.05)
        labels = [short_name(name) if panel is panels[0] else "" for name in places]
        panel.set_yticks(list(places.values()), labels, fontsize=8)
        panel.set_ylim(-0.6, len(places) - 0.4)
    outside_legend(figure, entries, n_columns=3)
    return figure


def early_ranking(ranked: pd.DataFrame, title: str) -> Figure:
    """Kendall's τ of each metric with the final loss over steps, and what it adds to the loss.

    Blue: the partial τ given the loss at the same step, with its band; dotted: its value if the
    metric contained nothing beyond the loss. Orange: τ of the metric itself. Dashed: τ of the loss
    so far, which is available for free.

    Args:
        ranked: rows of `rank_early` of one group.
        title: the figure's title.
    """
    metrics = list(dict.fromkeys(ranked["metric"]))
    figure, panels = new_figure(2, -(-len(metrics) // 2), title, width=2.9, height=2.4)
    for panel, metric in zip(panels, metrics, strict=False):
        rows = ranked[ranked["metric"] == metric].sort_values("step")
        for name, color in (("kendall", COLORS["post"]), ("given_loss", COLORS["pre"])):
            panel.plot(rows["step"], rows[name], color=color, linewidth=1.4)
            panel.fill_between(
                rows["step"],
                rows[f"{name}_low"].astype(float),
                rows[f"{name}_high"].astype(float),
                color=color,
                alpha=0.15,
                linewidth=0,
            )
        panel.plot(rows["step"], rows["loss_kendall"], color=LOSS_COLOR, linestyle="--", lw=1)
        panel.plot(rows["step"], rows["null"], color=COLORS["pre"], linestyle=":", lw=1)
        panel.axhline(0, color=NULL_COLOR, linewidth=0.8)
        panel.set_ylim(-1.05, 1.05)
        panel.set_title(short_name(metric), fontsize=8)
        panel.set_xlabel(axis_label("step"), fontsize=8)
        panel.set_ylabel("Kendall's τ with the final loss", fontsize=8)
    for panel in panels[len(metrics) :]:
        panel.remove()
    outside_legend(
        figure,
        [
            key("metric given the loss so far", color=COLORS["pre"]),
            key("the same without added information", color=COLORS["pre"], linestyle=":"),
            key("metric", color=COLORS["post"]),
            key("loss so far", color=LOSS_COLOR, linestyle="--"),
        ],
        n_columns=4,
    )
    return figure


def contrasts(compared: pd.DataFrame, title: str) -> Figure:
    """Differences between designs that differ in one factor only, with runs paired by seed.

    One row per pair of levels and setting of the other factors (if these differ), in the order of
    the settings; one panel per metric. With more than three levels, each is compared with the first
    of its setting. Gray: undecided, with fewer than 3 degrees of freedom.

    Args:
        compared: rows of `compare_seeds` of one factor, data and FFN.
        title: the figure's title.
    """
    pairs = ["level", "other", "where"]
    shown = compared[pairs].drop_duplicates()
    if len({*shown["level"], *shown["other"]}) > MAX_LEVELS:
        shown = shown[shown["other"] == shown.groupby("where")["other"].transform("first")]
    shown = shown.iloc[sorted(range(len(shown)), key=lambda i: _rank(shown["where"].iloc[i]))]
    shown = shown.head(MAX_CONTRASTS).reset_index(drop=True)
    metrics = list(dict.fromkeys(compared["metric"]))
    n_columns = -(-len(metrics) // 2)
    height = 1.0 + 0.34 * len(shown)
    figure, panels = new_figure(2, n_columns, title, width=2.3, height=height)
    figure.set_size_inches(figure.get_figwidth() + 2.4, figure.get_figheight())
    settings = _differences(list(shown["where"]))
    labels = [
        f"{plain_text(level)} − {plain_text(other)}"
        + (f"\n{plain_text(setting)}" if setting else "")
        for level, other, setting in zip(shown["level"], shown["other"], settings, strict=True)
    ]
    for i, (panel, name) in enumerate(zip(panels, metrics, strict=False)):
        rows = shown.merge(compared[compared["metric"] == name], on=pairs, how="left")
        places = pd.Series(range(len(rows) - 1, -1, -1), index=rows.index)
        decided = rows["outcome"] != "undecided"
        for which, color in ((decided, COLORS["pre"]), (~decided, NULL_COLOR)):
            own = rows[which]
            _points(panel, own["difference"], places[which], own["low"], own["high"], color)
        panel.axvline(0, color=NULL_COLOR, linewidth=0.8)
        is_first = i % n_columns == 0
        panel.set_yticks(list(places), labels if is_first else [""] * len(labels), fontsize=6)
        panel.set_ylim(-0.7, len(rows) - 0.3)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.set_title(short_name(name), fontsize=8)
        panel.set_xlabel(_unit(name, rows["unit"]), fontsize=8)
    for panel in panels[len(metrics) :]:
        panel.remove()
    return figure


def _rank(setting: str) -> list[tuple[str, float, str]]:
    """What sorts the settings of other factors: numbers by their size, not by their digits."""
    parts = [part.partition("=") for part in setting.split()]
    return [(name, _size(as_number(value)), value) for name, _, value in parts]


def _size(value: Any) -> float:
    try:
        return float(value)
    except ValueError:  # names come after numbers
        return math.inf


def _differences(settings: Sequence[str]) -> list[str]:
    """Each setting without the overrides common to all of them."""
    parts = [setting.split() for setting in settings]
    common = set.intersection(*map(set, parts)) if parts else set()
    return [" ".join(part for part in own if part not in common) for own in parts]


def _unit(name: str, units: pd.Series) -> str:
    if (units == "nats").any():
        return "difference of logarithms\n(nats; .1 is 10%)"
    metric = metric_of(name)
    if metric is not None and metric.unit != "nats":  # of EEE and ΔEEE, what the values mean
        return "difference"
    return "difference\n(nats)"


def _shifts(correlations: pd.DataFrame) -> pd.Series:
    """Shifts of up to a third of a row, so that the points of a metric do not hide each other."""
    place = correlations.groupby("metric", sort=False).cumcount()
    size = correlations.groupby("metric", sort=False)["metric"].transform("size")
    return (place + 0.5) / size * 0.66 - 0.33


def _points(
    panel: Axes,
    values: pd.Series,
    rows: pd.Series,
    low: pd.Series | None,
    high: pd.Series | None,
    color: str,
    *,
    with_bars: bool = True,
) -> None:
    """Points in rows, filled if there is an interval and it excludes 0."""
    if low is None or high is None:
        panel.plot(values, rows, "o", color=color, markersize=3, linestyle="none")
        return
    beyond = ((low > 0) | (high < 0)).fillna(False)
    if with_bars:
        panel.hlines(rows, low.astype(float), high.astype(float), color=color, linewidth=1)
    for which, face in ((beyond, color), (~beyond, "white")):
        panel.plot(
            values[which],
            rows[which],
            "o",
            markeredgecolor=color,
            markerfacecolor=face,
            markersize=3.5,
            linestyle="none",
        )
