"""The figures of the study: one per question, drawn from its runs.

Thin lines and points are seeds; bands range from the lowest seed to the highest. Flagged runs are
excluded from means and lines; where a question is about them, they are gray crosses.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from claims.long_runs import SWEEP
from claims.width import DESIGNS, FOUR, RATES, at_their_rates
from criteria.check import Judged
from evidence import Evidence, Sweep
from figure_of_effects import effects
from figure_of_long_runs import long_runs
from figures_by_factor import constraint, mixer, normfree, optimizer, placement, position
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from panels import (
    ACTIVATIONS,
    GREEN,
    PINK,
    POINT,
    Styles,
    caption,
    depth_map,
    legend,
    over_layers,
    over_steps,
    panels,
    present,
    scatter,
    strip,
)
from PIL import Image

from nerve import correlate_across_runs, correlate_within_runs
from nerve.report.style import (
    COLORS,
    DASHES,
    FLAGGED_COLOR,
    LOSS_COLOR,
    NULL_COLOR,
    name_axes,
    scale_by_ratio,
    short_name,
)

STYLES = {
    "layernorm gelu": {"color": GREEN},
    "none relu": {"color": PINK, "marker": "s"},
}
WINDOWS = {"all": "all", "after_warmup": "after\nwarm-up", "differences": "differ-\nences"}
CLOCK = {"color": NULL_COLOR, "marker": "_", "markersize": 14, "linestyle": "none"}
DPI = 150


def draw(evidence: Evidence, judged: Sequence[Judged], folder: Path) -> list[Path]:
    """Draws every figure whose runs exist, and returns the paths of the images.

    The same runs give the same bytes.

    Args:
        judged: the core checks; without any, there is no figure of effects.
        folder: where the images are written; other files there stay unchanged.
    """
    mixers = ["glyphs_activation", "glyphs_optimizer"]
    if not evidence.has(mixers):
        mixers = ["mixer_activation", "mixer_optimizer"]
    figures = {
        "overview": (overview, ["activation_gpu"]),
        "activation": (activation, ["activation_gpu"]),
        "depth": (depth, ["activation_gpu"]),
        "width": (width, ["ffn_width_gpu"]),
        "long_runs": (long_runs, [SWEEP]),
        "normfree": (normfree, ["normfree_gpu"]),
        "constraint": (constraint, ["ffn_constraint_gpu", "normfree_gpu"]),
        "placement": (placement, ["norm_placement_gpu"]),
        "position": (position, ["position_gpu"]),
        "optimizer": (optimizer, ["optimizer_gpu"]),
        "mixer": (mixer, mixers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    if judged:
        paths.append(folder / "effects.png")
        _save(effects(judged), paths[-1])
    for name, (make, sweeps) in figures.items():
        if evidence.has(sweeps):
            paths.append(folder / f"{name}.png")
            _save(make(evidence.sweep(*sweeps)), paths[-1])
    return paths


def overview(sweep: Sweep) -> Figure:
    """SE, PR, EEE before and after the nonlinearity over steps, and JS over depth and steps."""
    sweep = _of_size(sweep, _sizes(sweep)[0]).by("activation.name")
    title = "FFN spectra before (pre) and after (post) the nonlinearity"
    about = f"GPT, {caption(sweep)} (bands: lowest to highest)"
    figure, axes = panels(2, 2, title, about, width=8.4, height=2.6)
    dashes = {"gelu": DASHES[0], "relu": DASHES[1]}
    control = {"color": FLAGGED_COLOR, "linestyle": DASHES[2]}
    for panel, name in zip(axes, ("se", "pr", "eee"), strict=False):
        for site, color in COLORS.items():
            lines = {level: {"color": color, "linestyle": dash} for level, dash in dashes.items()}
            over_steps(panel, sweep.curves, f"{name}_{site}", {**lines, "identity": control})
        columns = [f"{name}_{site}" for site in COLORS]
        name_axes(panel, "step", columns[0], f"{name.upper()}, mean over layers", columns)
    scale_by_ratio(axes[1], sweep.curves[["pr_pre", "pr_post"]].stack())
    rows = sweep.all_layers
    depth_map(figure, axes[3], rows[rows["level"] == "gelu"], "js", "JS of pre and post, gelu")
    styles = {
        f"{level}, {site}": {"color": color, "linestyle": dash}
        for level, dash in dashes.items()
        for site, color in COLORS.items()
    }
    legend(figure, {**styles, "identity (control), pre and post": control}, n_columns=5)
    return figure


def activation(sweep: Sweep) -> Figure:
    """Final loss, SE_post, PR_post, and how early PR_post settles; one row per model size."""
    sizes = _sizes(sweep)
    figure, axes = panels(len(sizes), 4, "GELU and ReLU", f"GPT, {caption(sweep)}")
    styles = {level: ACTIVATIONS[level] for level in ("gelu", "relu")}
    for row, size in enumerate(sizes):
        own = _of_size(sweep, size).by("activation.name")
        losses, entropies, dimensions, settling = axes[4 * row : 4 * row + 4]
        strip(losses, own.ok, "val_loss", styles)
        losses.set_title(f"final loss, d_model {size}", fontsize=8)
        over_steps(entropies, own.curves, "se_post", styles)
        over_steps(dimensions, own.curves, "pr_post", styles)
        _settling(settling, own, styles)
    legend(figure, styles)
    return figure


def depth(sweep: Sweep) -> Figure:
    """JS and PR gain over layers."""
    sweep = _of_size(sweep, _sizes(sweep)[0]).by("activation.name")
    styles = present(ACTIVATIONS, sweep.ok)
    title = "How much the nonlinearity changes, layer by layer, at the last step"
    figure, axes = panels(1, 2, title, f"GPT, {caption(sweep)} (thin lines)", width=8.4)
    for panel, name in zip(axes, ("js", "pr_gain"), strict=True):
        over_layers(panel, sweep.layers, name, styles)
    legend(figure, styles)
    return figure


def width(sweep: Sweep) -> Figure:
    """Final metrics against final loss over widths, one row per design; below, correlations over
    the steps of each run, with that of the clock."""
    sweep = at_their_rates(sweep)
    title = "Metrics and loss: across widths, and (below) within runs"
    figure, axes = panels(3, 4, title, f"GPT, {caption(sweep)}; numbers: ffn.width", height=2.4)
    across = correlate_across_runs(sweep.points, ["level"], names=FOUR)
    across = across.set_index(["level", "metric"])["pearson"]
    within = correlate_within_runs(sweep.metrics, sweep.runs, ["level"], names=FOUR)
    within = within[within["flag"] == "ok"]
    styles = present(STYLES, sweep.ok)
    for row, (level, style) in enumerate(styles.items()):
        own = sweep.ok[sweep.ok["level"] == level].sort_values("d_ff")
        for panel, name in zip(axes[4 * row : 4 * row + 4], FOUR, strict=True):
            panel.plot(own["val_loss"], own[name], color=style["color"], linewidth=0.8)
            for _, end in own.iloc[[0, -1]].iterrows():
                panel.annotate(f" {end['ffn.width']:g}", (end["val_loss"], end[name]), fontsize=7)
            scatter(panel, own, "val_loss", name, {level: style})
            r = _signed(across[level, name])
            panel.set_title(f"{short_name(name)}, {DESIGNS[level]}: r {r}", fontsize=8)
    for panel, name in zip(axes[8:], FOUR, strict=True):
        _windows(panel, within[within["metric"] == name], styles)
        panel.set_title(f"{short_name(name)}, over steps", fontsize=8)
    names = {
        f"{DESIGNS[level]}, lr {RATES[level]:g}": {**POINT, **style}
        for level, style in styles.items()
    }
    legend(figure, {**names, "the clock, log(step + 1)": CLOCK})
    return figure


def _settling(panel: Axes, sweep: Sweep, styles: Styles) -> None:
    """PR_post as a share of its final value, with the range of ±10%."""
    final = sweep.curves["run_id"].map(sweep.ok.set_index("run_id")["pr_post"])
    over_steps(panel, sweep.curves.assign(share=sweep.curves["pr_post"] / final), "share", styles)
    panel.axhspan(0.9, 1.1, color=LOSS_COLOR, alpha=0.1, linewidth=0)
    panel.set_ylim(0, 1.2)
    panel.set_ylabel("PR post / its final value", fontsize=8)
    panel.set_title("settled: within 10% (gray)", fontsize=8)


def _windows(panel: Axes, within: pd.DataFrame, styles: Styles) -> None:
    """Pearson's r of each run in the three windows of steps, and the median of the clock's."""
    clock = within.groupby("window")["r_clock"].median().reindex(list(WINDOWS))
    panel.plot(range(len(WINDOWS)), clock, **CLOCK)
    for side, (level, style) in zip((-0.15, 0.15), styles.items(), strict=False):
        own = within[within["level"] == level]
        for place, window in enumerate(WINDOWS):
            values = own.loc[own["window"] == window, "pearson"]
            panel.plot(
                np.full(len(values), place + side), values, **{**POINT, **style, "alpha": 0.6}
            )
    panel.axhline(0, color=FLAGGED_COLOR, linewidth=0.8)
    panel.set_xticks(range(len(WINDOWS)), list(WINDOWS.values()))
    panel.set_xlim(-0.5, len(WINDOWS) - 0.5)
    panel.set_ylim(-1.08, 1.08)
    panel.set_ylabel("Pearson r with the loss", fontsize=8)


def _signed(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:+.2f}".replace("-", "−")


def _sizes(sweep: Sweep) -> list[int]:
    return sorted(sweep.ok["model.d_model"].unique())


def _of_size(sweep: Sweep, d_model: int) -> Sweep:
    return sweep.where(sweep.runs["model.d_model"] == d_model)


def _save(figure: Figure, path: Path) -> None:
    """Writes a PNG with 256 colors, which is a third of the size of one with all colors."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, pil_kwargs={"compress_level": 1})
    image = Image.open(buffer).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
