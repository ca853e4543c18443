"""Figures of one run: the paper's overview, heat maps over depth, the spectra, training curves.

Each function takes frames of one run and one FFN name and returns a matplotlib `Figure`. What could
not be measured is left blank or gray, never drawn as a number.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from nerve.metric_names import Metric, shown_in
from nerve.report.heat_map import heat_map
from nerve.report.style import (
    COLORS,
    FLAGGED_COLOR,
    LOSS_COLOR,
    axis_label,
    key,
    name_axes,
    new_figure,
    outside_legend,
    plain_text,
    say_empty,
    scale_by_ratio,
    spread,
)
from nerve.sites_and_groups import SITES

MAX_LAYERS = 6
MAX_RANKS = 240
FLOOR = 1e-9
"""Shares of the variance below this are rounding and are not drawn."""


def overview(metrics: pd.DataFrame, correlations: pd.DataFrame, title: str) -> Figure:
    """SE, PR and EEE over steps, before and after the nonlinearity, and JS as layers × steps.

    Lines are means over layers, bands ± one SD (n - 1); the validation loss is on the right axis.
    Dotted: the limits set by the rank of pre, PR ≤ r, SE ≤ ln r, EEE ≥ 1 - r/D.

    Args:
        metrics: rows of `load_metrics`.
        correlations: rows of `correlate_within_runs` of one window; their Pearson r is shown in the
            titles of the panels.
        title: the figure's title.
    """
    shown = shown_in("overview")
    figure, panels = new_figure(-(-len(shown) // 2), 2, title, width=4.6, height=2.8)
    pearson = correlations.set_index("metric")["pearson"]
    for panel, metric in zip(panels, shown, strict=False):
        if metric.has_sites:
            _both_sites(panel, metrics, metric, pearson)
        else:
            text = f"{metric.short}; r with loss: {_r(pearson, metric.column)}"
            heat_map(figure, panel, metrics, metric, text)
    for panel in panels[len(shown) :]:
        panel.remove()
    entries = [key(f"{site}, mean ± SD over layers", color=COLORS[site]) for site in COLORS]
    limit_entry = key("limit of pre by its rank", color=COLORS["pre"], linestyle=":")
    loss_entry = key("validation loss", color=LOSS_COLOR, linestyle="--", linewidth=1)
    outside_legend(figure, [*entries, limit_entry, loss_entry])
    return figure


def gain_maps(metrics: pd.DataFrame, title: str) -> Figure:
    """PR gain (post/pre, logarithmic), ΔEEE (post - pre) and the variance outside the span of pre,
    as layers × steps.

    In the first two, purple is flattening, orange the opposite, white no change; gray is not
    measured.
    """
    shown = shown_in("maps")
    figure, panels = new_figure(1, len(shown), title, width=4.6, height=2.8)
    for panel, metric in zip(panels, shown, strict=True):
        heat_map(figure, panel, metrics, metric, metric.short)
    return figure


def spectra(
    spectra: pd.DataFrame, metrics: pd.DataFrame, title: str, steps: Sequence[int]
) -> Figure:
    """Shares of the variance p = λ/Σλ by rank, log-log, pre and post, at `steps`.

    Up to six evenly spaced layers, including the first and the last; later steps are darker. The
    dotted line is the rank limit of pre. Shares below 1e-9 are not drawn.

    Args:
        spectra: rows of `load_spectra`.
        metrics: rows of `load_metrics`, for the rank limits.
        title: the figure's title.
        steps: stored steps, increasing.
    """
    layers = spread(sorted(spectra["layer"].unique()), MAX_LAYERS)
    n_columns = 2 if len(layers) in (2, 4) else min(3, len(layers))
    n_rows = math.ceil(len(layers) / n_columns)
    figure, panels = new_figure(n_rows, n_columns, title, width=3.6, height=2.6)
    # The last step has the full color, even if it is the only one.
    shades = dict(zip(steps, np.linspace(1.0, 0.35, len(steps))[::-1], strict=True))
    for panel in panels[1 : len(layers)]:
        panel.sharex(panels[0])
        panel.sharey(panels[0])
    for panel, layer in zip(panels, layers, strict=False):
        rows = spectra[(spectra["layer"] == layer) & spectra["step"].isin(steps)]
        ordered = rows.sort_values("step")
        for step, site, values in zip(
            ordered["step"], ordered["site"], ordered["eigenvalues"], strict=True
        ):
            ranks, shares = _shares(values)
            color = _shade(COLORS[site], shades[step])
            panel.loglog(ranks, shares, color=color, linewidth=1.2)
        limits = metrics.loc[metrics["layer"] == layer, "rank_limit_pre"]
        if len(limits):
            panel.axvline(limits.iloc[-1], color=COLORS["pre"], linestyle=":", linewidth=1)
        if rows.empty:
            say_empty(panel)
        panel.set_title(f"layer {layer}", fontsize=8)
        panel.set_xlabel("rank k of the eigenvalue", fontsize=8)
        panel.set_ylabel("share of variance λₖ/Σλ", fontsize=8)
    for panel in panels[len(layers) :]:
        panel.remove()
    entries = [
        key(f"{site}, step {step:,}", color=_shade(COLORS[site], shade))
        for step, shade in shades.items()
        for site in COLORS
    ]
    limit_entry = key("rank limit of pre", color=COLORS["pre"], linestyle=":")
    outside_legend(figure, [*entries, limit_entry], n_columns=len(shades) + 1)
    return figure


def training(
    metrics: pd.DataFrame, scalars: pd.DataFrame, unigram_loss: float | None, title: str
) -> Figure:
    """Losses, learning rate, and other logged values over steps.

    Args:
        metrics: rows of `load_metrics`: validation loss and learning rate at measured steps.
        scalars: rows of `load_scalars`; `train_loss` (without it, that of `metrics`) is drawn with
            the validation loss, and up to four other names have their own panels.
        unigram_loss: the loss of a model that only knows token frequencies, drawn as a line; None
            for no line.
        title: the figure's title.
    """
    logged = {str(name): rows for name, rows in scalars.groupby("name", sort=True, observed=True)}
    measured = metrics.drop_duplicates("step").sort_values("step")
    train, trained = logged.pop("train_loss", None), "training batch"
    if train is None:  # of a loop other than nerve-run's
        train = measured.rename(columns={"train_loss": "value"}).dropna(subset="value")
        trained = "training, mean since the last measurement"
    logged.pop("val_loss", None)
    others = list(logged.items())[:4]
    n_panels = 2 + len(others)
    n_columns = min(3, n_panels)
    n_rows = math.ceil(n_panels / n_columns)
    figure, panels = new_figure(n_rows, n_columns, title, width=4.2, height=2.7)
    panels[0].plot(train["step"], train["value"], color=FLAGGED_COLOR, linewidth=1)
    evaluated = measured.dropna(subset="val_loss")
    panels[0].plot(evaluated["step"], evaluated["val_loss"], color=LOSS_COLOR, marker=".")
    entries = [key("validation", color=LOSS_COLOR, marker=".")]
    if len(train):
        entries.insert(0, key(trained, color=FLAGGED_COLOR))
    if unigram_loss is not None and np.isfinite(unigram_loss):
        panels[0].axhline(unigram_loss, color=LOSS_COLOR, linestyle=":", linewidth=1)
        entries.append(key("unigram loss", color=LOSS_COLOR, linestyle=":"))
    if measured["val_loss"].isna().all() and train.empty:
        say_empty(panels[0], "no loss was stored")
    name_axes(panels[0], "step", "loss", "loss", ["val_loss"])
    panels[1].plot(measured["step"], measured["lr"], color=LOSS_COLOR)
    name_axes(panels[1], "step", "lr", "learning rate of the hidden weights")
    for panel, (name, rows) in zip(panels[2:], others, strict=False):
        panel.plot(rows["step"], rows["value"], color=LOSS_COLOR, marker=".")
        name_axes(panel, "step", plain_text(name), plain_text(name))
    for panel in panels[n_panels:]:
        panel.remove()
    outside_legend(figure, entries)
    return figure


def chosen_steps(stored: Sequence[int], asked: Sequence[int] = ()) -> list[int]:
    """The steps whose spectra are drawn: the stored steps nearest to the requested ones.

    If none are requested: the first, the last and two in between.
    """
    stored = sorted(stored)
    if not asked:
        return spread(stored, 4)
    return sorted({min(stored, key=lambda step: abs(step - wanted)) for wanted in asked})


def _both_sites(panel: Axes, metrics: pd.DataFrame, metric: Metric, pearson: pd.Series) -> None:
    """A metric before and after the nonlinearity, with its limit and the loss."""
    for site in SITES:
        _band(panel, metrics, metric.at(site), COLORS[site], metric.bounds)
    limit = _rank_limit(metrics, metric)
    if limit is not None and np.isfinite(limit):
        panel.axhline(limit, color=COLORS["pre"], linestyle=":", linewidth=1)
    values = metrics[list(metric.columns)]
    if values.isna().all(axis=None):
        say_empty(panel)
    texts = [f"{site} {_r(pearson, metric.at(site))}" for site in SITES]
    title = f"{metric.short}; r with loss: {', '.join(texts)}"
    name_axes(panel, "step", metric.at("pre"), title, metric.columns)
    _add_loss(panel, metrics)
    if metric.is_ratio:
        scale_by_ratio(panel, pd.concat([values[name] for name in values]))


def _band(
    panel: Axes, metrics: pd.DataFrame, name: str, color: str, bounds: tuple[float, float]
) -> None:
    """Mean over layers ± one SD, clipped to the metric's range."""
    over_layers = metrics.groupby("step")[name].agg(["mean", "std"])
    mean, spread = over_layers["mean"], over_layers["std"].fillna(0)
    panel.plot(over_layers.index, mean, color=color, linewidth=1.5)
    low, high = (mean - spread).clip(*bounds), (mean + spread).clip(*bounds)
    panel.fill_between(over_layers.index, low, high, color=color, alpha=0.2, linewidth=0)


def _add_loss(panel: Axes, metrics: pd.DataFrame) -> None:
    loss = metrics.groupby("step")["val_loss"].first().dropna()  # not evaluated at every step
    right = panel.twinx()
    right.plot(loss.index, loss, color=LOSS_COLOR, linestyle="--", linewidth=1)
    right.set_ylabel(axis_label("val_loss"), fontsize=8)
    right.tick_params(labelsize=7)
    right.spines["top"].set_visible(False)


def _rank_limit(metrics: pd.DataFrame, metric: Metric) -> float | None:
    """The limit that the rank sets on a metric of pre, in the least limited layer; None for a
    metric without such a limit."""
    sizes = metrics[["rank_limit_pre", "d_ff"]].clip(lower=1).drop_duplicates()
    pairs = list(sizes.itertuples(index=False, name=None))
    if metric.at_most is not None:
        return max(metric.at_most(rank, dim) for rank, dim in pairs)
    if metric.at_least is not None:
        return min(metric.at_least(rank, dim) for rank, dim in pairs)
    return None


def _r(pearson: pd.Series, name: str) -> str:
    value = pearson.get(name, np.nan)
    return "–" if pd.isna(value) else f"{value:+.2f}".replace("-", "−")


def _shares(eigenvalues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, evenly spaced on a logarithmic axis, and their shares of the variance."""
    ordered = np.sort(np.asarray(eigenvalues, float))[::-1]
    total = ordered.sum()
    if not total > 0:
        return np.empty(0), np.empty(0)
    ranks = np.unique(np.geomspace(1, len(ordered), MAX_RANKS).round().astype(int))
    shares = ordered[ranks - 1] / total
    return ranks[shares >= FLOOR], shares[shares >= FLOOR]


def _shade(color: str, strength: float) -> tuple[float, float, float]:
    red, green, blue = (1 - strength * (1 - part) for part in to_rgb(color))
    return red, green, blue
