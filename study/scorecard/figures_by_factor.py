"""Figures of one factor each: norms, weight constraints, positions, optimizers, the Mixer's."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd
from claims.optimizer import best_rates
from claims.position import in_setting
from evidence import Sweep, last_step
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from panels import (
    ACTIVATIONS,
    BLACK,
    GREEN,
    OLIVE,
    ORANGE,
    PINK,
    POINT,
    SKY,
    WINE,
    caption,
    legend,
    over_layers,
    over_steps,
    panels,
    present,
    scatter,
    strip,
)

from nerve import fit_width_scaling
from nerve.report.style import (
    FLAGGED_COLOR,
    LOSS_COLOR,
    axis_label,
    key,
    plain_text,
    scale_by_ratio,
    short_name,
)

KINDS = {"layernorm": "PreLN", "none": "norm-free"}
CONSTRAINTS = {
    "none": {"color": BLACK},
    "spectral_norm": {"color": GREEN},
    "weight_norm": {"color": ORANGE},
    "hyperspherical": {"color": WINE},
}
PLACEMENTS = {"pre": {"color": GREEN}, "mix": {"color": ORANGE}, "post": {"color": WINE}}
POSITIONS = {"rope": {"color": GREEN}, "learned": {"color": ORANGE}, "none": {"color": WINE}}
OPTIMIZERS = {
    "adamw": {"color": ORANGE},
    "dion": {"color": SKY},
    "muon": {"color": GREEN},
    "sgd": {"color": PINK},
    "adafactor": {"color": OLIVE},
    "soap": {"color": WINE},
    "shampoo": {"color": BLACK},
}
NEAR = 1.0
"""Nats above the lowest loss that the axis of losses reaches."""
REGIONS = {"middle": "middle third", "all": "all layers"}
FFNS = ("token_mixing", "channel_mixing")
MIXED = ("gelu", "relu")


def normfree(sweep: Sweep) -> Figure:
    """EEE_post, JS and PR gain over layers with norms and without, and the final losses."""
    sweep = sweep.by("activation.name")
    styles = present(ACTIVATIONS, sweep.ok)
    figure, axes = panels(2, 4, "With norms and without", f"GPT, {caption(sweep)} (thin lines)")
    for above, below in zip(axes[:4], axes[4:], strict=True):
        below.sharey(above)
    for row, (kind, name) in enumerate(KINDS.items()):
        own = sweep.where(sweep.runs["normalization.kind"] == kind)
        *depths, losses = axes[4 * row : 4 * row + 4]
        for panel, metric in zip(depths, ("eee_post", "js", "pr_gain"), strict=True):
            over_layers(panel, own.layers, metric, styles)
            panel.set_title(f"{name}: {short_name(metric)}", fontsize=8)
        strip(losses, own.ok, "val_loss", styles)
        losses.set_title(f"{name}: final loss", fontsize=8)
        losses.tick_params(axis="x", labelbottom=False)
    scale_by_ratio(axes[2], sweep.layers["pr_gain"])
    legend(figure, styles)
    return figure


def constraint(sweep: Sweep) -> Figure:
    """Norm-free GELU: EEE_post and JS over layers by constraint, and the loss against EEE_post."""
    runs = sweep.runs
    kept = (runs["normalization.kind"] == "none") & (runs["activation.name"] == "gelu")
    sweep = sweep.where(kept).by("ffn.constraint")
    styles = present(CONSTRAINTS, sweep.ok)
    title = "Constraints of the FFN's weights without norms, gelu"
    figure, axes = panels(1, 3, title, f"GPT, {caption(sweep)} (thin lines)")
    for panel, name in zip(axes, ("eee_post", "js"), strict=False):
        over_layers(panel, sweep.layers, name, styles)
    scatter(axes[2], sweep.ok, "val_loss", "eee_post", styles)
    axes[2].set_title("EEE post, mean over layers, and final loss", fontsize=8)
    legend(figure, styles)
    return figure


def placement(sweep: Sweep) -> Figure:
    """PR_post (mean over layers) and loss over d_ff, with the power law of each placement."""
    compared = in_setting(sweep).by("normalization.placement")
    styles = present(PLACEMENTS, compared.ok)
    title = "PR post over the width of the FFN, by placement of the norm"
    figure, axes = panels(1, 2, title, f"GPT, {caption(compared)}", width=8.4, height=2.9)
    for panel, name in zip(axes, ("pr_post", "val_loss"), strict=True):
        for level, style in styles.items():
            own = compared.ok[compared.ok["level"] == level]
            panel.plot(own["d_ff"], own[name], **{**POINT, **style})
            mean = own.groupby("d_ff")[name].mean()
            panel.plot(mean.index, mean, **style)
        _widths(panel, compared.points["d_ff"].dropna())
        panel.set_ylabel(axis_label(name), fontsize=8)
        panel.set_title(f"{short_name(name)}, last step", fontsize=8)
    warm_up = "optimizer.schedule.warmup"
    more = _flagged(axes[0], sweep.by("normalization.placement", warm_up).points)
    scale_by_ratio(axes[0], sweep.points["pr_post"].dropna())
    axes[0].margins(x=0.15, y=0.1)
    fits = fit_width_scaling(compared.points, ["level"], names=["pr_post"])
    exponents = fits.set_index("level")["exponent"]
    names = {}
    for level, style in styles.items():
        law = "" if pd.isna(exponents[level]) else f": exponent {exponents[level]:.2f}"
        names[f"{level}{law}"] = style
    legend(figure, names, *more, n_columns=3)
    return figure


def position(sweep: Sweep) -> Figure:
    """The loss over steps, final losses, and PR before and after over layers."""
    sweep = sweep.by("position.name")
    styles = present(POSITIONS, sweep.ok)
    figure, axes = panels(1, 4, "Position encodings", f"GPT, {caption(sweep)}", height=2.7)
    curves = sweep.curves
    over_steps(axes[0], curves[curves["step"] >= 0.2 * curves["step"].max()], "val_loss", styles)
    strip(axes[1], sweep.ok, "val_loss", styles)
    axes[1].set_title("final loss", fontsize=8)
    for panel, name in zip(axes[2:], ("pr_pre", "pr_post"), strict=True):
        over_layers(panel, sweep.layers, name, styles)
    legend(figure, styles)
    return figure


def optimizer(sweep: Sweep) -> Figure:
    """Layers of each optimizer at its best rate; loss against PR_post of all rates."""
    sweep = sweep.by("optimizer.name")
    about = f"GPT, {caption(sweep)}; best rate: lowest loss of seed 0"
    figure, axes = panels(2, 3, "Optimizers", about)
    best = best_rates(sweep)
    styles = {level: style for level, style in OPTIMIZERS.items() if level in best}
    layers = _at_rates(sweep.layers, best)
    places = (axes[0], axes[1], axes[3], axes[4])
    for panel, name in zip(places, ("pr_pre", "pr_post", "pr_gain", "eee_post"), strict=True):
        over_layers(panel, layers, name, styles)
        panel.set_title(f"{short_name(name)}, best rates", fontsize=8)
    hollow = {level: {**style, "markerfacecolor": "none"} for level, style in styles.items()}
    final = last_step(sweep.means)
    limit = final["val_loss"].min() + NEAR
    for panel, (region, where) in zip((axes[2], axes[5]), REGIONS.items(), strict=True):
        rows = final[final["region"] == region]
        near = rows[rows["val_loss"] <= limit]
        scatter(panel, near, "val_loss", "pr_post", hollow)
        scatter(panel, _at_rates(near, best), "val_loss", "pr_post", styles)
        scale_by_ratio(panel, near["pr_post"])
        panel.set_title(
            f"PR post, {where}\n(hollow: other rates; {len(rows) - len(near)} runs beyond)",
            fontsize=8,
        )
    names = {f"{level}, best lr {best[level]:g}": style for level, style in styles.items()}
    legend(figure, names, n_columns=3)
    return figure


def mixer(sweep: Sweep) -> Figure:
    """Accuracy and PR_post by the activations of both FFNs; of AdamW and SGD over their rates."""
    figure, axes = panels(1, 4, "MLP-Mixer", caption(sweep), height=2.8)
    cells = sweep.where(sweep.runs["folder"].str.endswith("_activation"))
    pairs = cells.by(*(f"model.{ffn}.activation" for ffn in FFNS)).ok
    means = _of_runs(pairs)
    levels = {" ".join(pair): {"color": LOSS_COLOR} for pair in product(MIXED, repeat=2)}
    for panel, name in zip(axes[:2], ("final.val_accuracy", "pr_post"), strict=True):
        strip(panel, means, name, levels)
        panel.set_xticks(range(len(levels)), [level.replace(" ", "\n") for level in levels])
        panel.set_xlabel("above: of token mixing,\nbelow: of channel mixing", fontsize=8)
    trained = sweep.where(sweep.runs["folder"].str.endswith("_optimizer")).by("optimizer.name")
    styles = present(OPTIMIZERS, trained.ok)
    runs = _of_runs(trained.ok)
    for panel, name in zip(axes[2:], ("final.val_accuracy", "pr_post"), strict=True):
        over_rates = runs.groupby(["level", "optimizer.lr"])[name].mean()
        for level, style in styles.items():
            line = over_rates.xs(level)
            panel.plot(line.index, line, **style)
        scatter(panel, runs, "optimizer.lr", name, styles)
        panel.set_xscale("log")
    for panel in (axes[0], axes[2]):
        panel.set_ylabel("accuracy", fontsize=8)
        panel.set_title("final accuracy", fontsize=8)
    for panel in (axes[1], axes[3]):
        panel.set_title("PR post, mean over all FFNs", fontsize=8)
    legend(figure, styles)
    return figure


def _of_runs(points: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its accuracy, and the mean of PR_post over both FFNs."""
    of_run = ["run_id", "level", "seed", "optimizer.lr"]
    return points.groupby(of_run)[["final.val_accuracy", "pr_post"]].mean().reset_index()


def _flagged(panel: Axes, points: pd.DataFrame) -> list[Line2D]:
    """Gray crosses, each with its level's name, for runs that cannot be compared."""
    flagged = points[(points["flag"] != "ok") & points["pr_post"].notna()]
    if flagged.empty:
        return []
    cross: dict[str, Any] = {"marker": "x", "color": FLAGGED_COLOR, "linestyle": "none"}
    panel.plot(flagged["d_ff"], flagged["pr_post"], **cross)
    for _, run in flagged.iterrows():
        panel.annotate(
            plain_text(run["level"]),
            (run["d_ff"], run["pr_post"]),
            xytext=(0, -5),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
            color=FLAGGED_COLOR,
        )
    return [key("flagged, with its warm-up; left panel only", **cross)]


def _at_rates(rows: pd.DataFrame, rates: Mapping[str, float]) -> pd.DataFrame:
    """The rows of runs at their level's rate."""
    return rows[rows["optimizer.lr"] == rows["level"].map(rates)]


def _widths(panel: Axes, d_ff: pd.Series) -> None:
    """A logarithmic axis of d_ff with a tick at each width."""
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sorted(d_ff.unique())))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("d_ff", fontsize=8)
