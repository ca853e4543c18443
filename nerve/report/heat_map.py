"""A heat map of a metric over layers and steps; gray where nothing could be measured."""

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from nerve.metric_names import Metric
from nerve.report.style import NULL_COLOR, PLAIN_NUMBERS, name_axes, say_empty, spread


def heat_map(
    figure: Figure, panel: Axes, metrics: pd.DataFrame, metric: Metric, title: str
) -> None:
    """Draws a metric as layers × steps, with a color bar to the right of the panel.

    Args:
        figure, panel: where to draw it.
        metrics: rows of `load_metrics` of one run and one FFN name.
        metric: a metric without sites.
        title: title of the panel.
    """
    grid = metrics.pivot(index="layer", columns="step", values=metric.column)
    values = np.ma.masked_invalid(grid.to_numpy(float))
    name_axes(panel, "step", "layer", title)
    panel.set_facecolor(NULL_COLOR)
    panel.set_yticks(spread(list(grid.index), 12))
    if values.count() == 0:
        say_empty(panel)
        return
    palette, norm = _scale(metric, values)
    mesh = panel.pcolormesh(
        _edges(grid.columns.to_numpy(float)),
        _edges(grid.index.to_numpy(float)),
        values,
        cmap=colormaps[palette].with_extremes(bad=NULL_COLOR),
        norm=norm,
        rasterized=True,
    )
    bar = figure.colorbar(mesh, cax=panel.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label(metric.label, fontsize=8)
    if isinstance(norm, LogNorm):
        bar.set_ticks(list(np.geomspace(*mesh.get_clim(), 5)), minor=False)
        bar.set_ticks([], minor=True)
        bar.ax.yaxis.set_major_formatter(PLAIN_NUMBERS)
    bar.ax.tick_params(labelsize=7)


def _scale(metric: Metric, values: np.ma.MaskedArray) -> tuple[str, Normalize]:
    """The color scale of a heat map: starting at 0, or symmetric around the value that means no
    change. Purple is where the nonlinearity flattens the spectrum."""
    if metric.neutral is None:
        return "viridis", Normalize(0, max(float(values.max()), 1e-6))
    palette = "PuOr" if metric.flatter == "above" else "PuOr_r"
    if metric.is_ratio:
        reach = max(float(np.exp(np.abs(np.log(values / metric.neutral)).max())), 1.1)
        return palette, LogNorm(metric.neutral / reach, metric.neutral * reach)
    reach = max(float(np.abs(values - metric.neutral).max()), 0.02)
    return palette, Normalize(metric.neutral - reach, metric.neutral + reach)


def _edges(centers: np.ndarray) -> np.ndarray:
    """Edges halfway between centers."""
    if len(centers) == 1:
        return np.array([centers[0] - 0.5, centers[0] + 0.5])
    middle = (centers[1:] + centers[:-1]) / 2
    first, last = 2 * centers[0] - middle[0], 2 * centers[-1] - middle[-1]
    return np.concatenate([[first], middle, [last]])
