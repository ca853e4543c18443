"""The style of all figures: colors, labels with units, legends outside the panels, literal text.

Figures use only matplotlib's objects, not pyplot and its global state.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nerve.analysis.factors import is_number, level_text
from nerve.metric_names import metric_of
from nerve.sites_and_groups import SITES

T = TypeVar("T")

# Okabe & Ito (2008), distinguishable with all common kinds of color vision.
COLORS = {"pre": "#0072B2", "post": "#D55E00"}
LOSS_COLOR = "#333333"
FLAGGED_COLOR = "#8C8C8C"
NULL_COLOR = "#9A9A9A"

# The remaining colors of Okabe & Ito, and three of Tol's that are distinguishable from them.
LEVEL_COLORS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
MAX_LEGEND = 12
MAX_TEXT = 48
MAX_TITLE = 110

LABELS = {
    "step": "optimizer step",
    "layer": "layer",
    "depth": "depth, (layer + ½) / number of layers",
    "val_loss": "validation loss (nats)",
    "train_loss": "training loss (nats)",
    "loss": "loss (nats per target)",
    "lr": "learning rate",
}
"""Labels of axes that show no metric; the catalog has those of metrics."""


def axis_label(column: str) -> str:
    """The label of an axis, with the unit."""
    metric = metric_of(column)
    return LABELS.get(column, column) if metric is None else metric.label


def short_name(column: str) -> str:
    """The paper's short name: `PR post`, `JS`, `ΔEEE`; for a loss, its label without the unit."""
    metric = metric_of(column)
    if metric is None:
        return axis_label(column).partition(" (")[0]
    sites = SITES if metric.has_sites else ()
    return " ".join([metric.short, *(site for site in sites if metric.at(site) == column)])


def one_line(text: object, max_length: int = MAX_TEXT) -> str:
    """Text of a run as one short printable line."""
    line = " ".join(str(text).split())
    line = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def plain_text(text: object, max_length: int = MAX_TEXT) -> str:
    """Text of a run as one short line that matplotlib does not interpret as mathematics."""
    return one_line(text, max_length).replace("$", r"\$")


def spread(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of the values, evenly spaced, including the first and the last."""
    picked = np.unique(np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int))
    return [values[i] for i in picked]


def new_figure(
    n_rows: int, n_columns: int, title: str, *, width: float = 3.3, height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    """A figure with room for its legend, and its panels row by row; sizes are inches per panel."""
    figure = Figure(figsize=(width * n_columns, height * n_rows + 0.9), layout="constrained")
    figure.suptitle(plain_text(title, MAX_TITLE), fontsize=10)
    panels = [figure.add_subplot(n_rows, n_columns, i + 1) for i in range(n_rows * n_columns)]
    for panel in panels:
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels


def name_axes(
    panel: Axes, x: str, y: str, title: str = "", columns: Sequence[str] | None = None
) -> None:
    """Labels the axes of a panel with the names and units of columns.

    Args:
        columns: the columns that the panel shows, if these are more than `y`.
    """
    panel.set_xlabel(axis_label(x), fontsize=8)
    panel.set_ylabel(axis_label(y), fontsize=8)
    panel.set_gid(f"{x}:{','.join(columns or [y])}")
    if title:
        panel.set_title(title, fontsize=8)


def panel_columns(panel: Axes) -> tuple[str, list[str]]:
    """The columns that `name_axes` recorded for a panel: that of x, and those that it shows."""
    x, _, shown = (panel.get_gid() or "").partition(":")
    return x, shown.split(",") if shown else []


def scale_by_ratio(panel: Axes, values: pd.Series) -> None:
    """Makes the y axis logarithmic if the values span more than a factor of four (PR, PR gain)."""
    positive = values[values > 0]
    if len(positive) and positive.max() > 4 * positive.min():
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(PLAIN_NUMBERS)
        panel.yaxis.set_minor_formatter(NullFormatter())


def say_empty(panel: Axes, text: str = "nothing could be measured") -> None:
    """Says in an empty panel why it is empty."""
    panel.text(
        0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", fontsize=8, wrap=True
    )


def key(text: str, **style: Any) -> Line2D:
    """An entry of a legend."""
    # Older versions of matplotlib hide labels that start with an underscore.
    return Line2D([], [], label=f" {text}" if text.startswith("_") else text, **style)


def outside_legend(
    figure: Figure,
    entries: Sequence[Artist],
    title: str | None = None,
    n_columns: int = 6,
) -> None:
    """The legend below all panels, filled column by column."""
    figure.legend(
        handles=list(entries),
        loc="outside lower center",
        ncols=min(len(entries), n_columns),
        title=title,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )


def level_colors(levels: Sequence[Any]) -> dict[str, Any]:
    """A color for each level's text: distinct ones, or a color scale for numbers or many levels."""
    texts = [level_text(level) for level in levels]
    if len(texts) <= len(LEVEL_COLORS) and not (len(texts) > 2 and all(map(is_number, levels))):
        return dict(zip(texts, LEVEL_COLORS, strict=False))
    positions = np.linspace(0, 0.9, len(texts))
    return dict(zip(texts, map(tuple, colormaps["viridis"](positions)), strict=True))


def level_keys(colors: dict[str, Any], **style: Any) -> list[Line2D]:
    """Legend entries for levels; if there are many, a few evenly spaced ones."""
    texts = list(colors)
    if len(texts) > MAX_LEGEND:
        texts = spread(texts, MAX_LEGEND)
    return [key(plain_text(text), color=colors[text], **style) for text in texts]
