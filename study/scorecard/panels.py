"""What the figures share: panels that show every seed, and how designs look."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from evidence import Sweep, span
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nerve.report.style import (
    FLAGGED_COLOR,
    LEVEL_COLORS,
    MAX_TITLE,
    axis_label,
    key,
    name_axes,
    new_figure,
    outside_legend,
    plain_text,
    scale_by_ratio,
    short_name,
)

Styles = Mapping[str, Mapping[str, Any]]
"""How the lines of each level look: arguments of matplotlib's `Line2D`."""

GREEN, PINK, ORANGE, SKY, BLACK, WINE, OLIVE = LEVEL_COLORS
ACTIVATIONS = {
    "gelu": {"color": GREEN},
    "relu": {"color": PINK},
    "learnable_leaky_relu": {"color": ORANGE},
    "identity": {"color": FLAGGED_COLOR},
}
WIDTH = 9.2
"""Inches: 1,380 pixels, so that 8-point text can be read where a page shows them on 900."""

SEED_LINE: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.55}
MEAN_LINE: dict[str, Any] = {"linewidth": 1.8}
POINT: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linestyle": "none"}


def caption(sweep: Sweep) -> str:
    """Scale, steps and seeds of the runs that can be compared."""
    runs = sweep.compared
    sizes = " and ".join(map(str, sorted(runs["model.d_model"].unique())))
    n_seeds = runs.groupby("design_id")["seed"].nunique()
    plural = "" if n_seeds.max() == 1 else "s"
    return (
        f"{span(runs['model.n_layers'])} layers, d_model {sizes}, "
        f"{span(runs['step'])} steps, {span(n_seeds)} seed{plural}"
    )


def panels(
    n_rows: int,
    n_columns: int,
    title: str,
    about: str,
    *,
    width: float = WIDTH,
    height: float = 2.5,
) -> tuple[Figure, list[Axes]]:
    """`new_figure` of `width` inches with a second line of title, `about` the runs."""
    figure, axes = new_figure(n_rows, n_columns, title, width=width / n_columns, height=height)
    figure.suptitle(f"{plain_text(title, MAX_TITLE)}\n{plain_text(about, MAX_TITLE)}", fontsize=10)
    return figure, axes


def over_steps(panel: Axes, rows: pd.DataFrame, name: str, styles: Styles) -> None:
    """A line per level, the mean over its seeds, with a band from the lowest to the highest."""
    for level, style in styles.items():
        seeds = rows[rows["level"] == level].groupby("step")[name]
        if not len(seeds):
            continue
        mean = seeds.mean()
        panel.plot(mean.index, mean, **{**MEAN_LINE, **style})
        color = style["color"]
        panel.fill_between(mean.index, seeds.min(), seeds.max(), color=color, alpha=0.2, lw=0)
    name_axes(panel, "step", name, short_name(name))


def over_layers(panel: Axes, rows: pd.DataFrame, name: str, styles: Styles) -> None:
    """Thick, a level's mean over seeds by layer; thin, each of its runs."""
    for level, style in styles.items():
        own = rows[rows["level"] == level]
        for _, run in own.groupby("run_id", sort=False, observed=True):
            panel.plot(run["layer"], run[name], **{**style, **SEED_LINE})
        mean = own.groupby("layer")[name].mean()
        panel.plot(mean.index, mean, **{**MEAN_LINE, **style})
    name_axes(panel, "layer", name, short_name(name))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    if name.startswith("pr_"):
        scale_by_ratio(panel, rows[name])


def strip(panel: Axes, points: pd.DataFrame, name: str, styles: Styles) -> None:
    """A column of points per level, one per run, with a bar at their mean; thin lines connect the
    runs of one seed, which share their initialization and the order of their data."""
    seeds = points.pivot_table(index="level", columns="seed", values=name).reindex(list(styles))
    panel.plot(range(len(styles)), seeds, color=FLAGGED_COLOR, linewidth=0.6, alpha=0.7)
    for place, (level, style) in enumerate(styles.items()):
        values = points.loc[points["level"] == level].sort_values("seed")[name].to_numpy(float)
        panel.plot(np.full(len(values), place), values, **{**POINT, **style})
        if len(values):
            panel.plot([place - 0.25, place + 0.25], [values.mean()] * 2, color=style["color"])
    panel.set_xticks(range(len(styles)), [plain_text(level) for level in styles])
    panel.set_xlim(-0.5, len(styles) - 0.5)
    panel.set_ylabel(axis_label(name), fontsize=8)
    panel.set_title(short_name(name), fontsize=8)


def scatter(panel: Axes, points: pd.DataFrame, x: str, y: str, styles: Styles) -> None:
    """One point per run."""
    for level, style in styles.items():
        own = points[points["level"] == level]
        panel.plot(own[x], own[y], **{**POINT, **style})
    name_axes(panel, x, y, short_name(y))


def depth_map(figure: Figure, panel: Axes, rows: pd.DataFrame, name: str, title: str) -> None:
    """A metric as layers × steps, the mean over runs, from 0."""
    cells = rows.groupby(["layer", "step"])[name].mean().unstack()
    mesh = panel.pcolormesh(
        cells.columns.to_numpy(float),
        cells.index.to_numpy(float),
        cells.to_numpy(float),
        shading="nearest",
        cmap=colormaps["viridis"],
        vmin=0,
    )
    name_axes(panel, "step", "layer", title)
    panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(mesh, cax=panel.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(axis_label(name), fontsize=8)
    bar.ax.tick_params(labelsize=7)


def legend(figure: Figure, styles: Styles, *more: Line2D, n_columns: int = 6) -> None:
    """The levels' names below all panels."""
    entries = [key(plain_text(level), **{**MEAN_LINE, **style}) for level, style in styles.items()]
    outside_legend(figure, [*entries, *more], n_columns=n_columns)


def present(styles: Styles, rows: pd.DataFrame) -> Styles:
    """The styles of levels that the rows have."""
    found = set(rows["level"])
    return {level: style for level, style in styles.items() if level in found}
