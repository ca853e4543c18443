"""Figures of one factor each: norms, weight constraints, positions, optimizers, the Mixer's."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from claims.mixer import best_rates as best_mixer_rates
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
    Styles,
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
    COLORS,
    DASHES,
    FLAGGED_COLOR,
    LOSS_COLOR,
    axis_label,
    key,
    name_axes,
    plain,
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
REGIONS = {"middle": "middle third", "all": "all layers"}
FFNS = {"token_mixing": "token mixing", "channel_mixing": "channel mixing"}
MIXED = {"gelu": DASHES[0], "relu": DASHES[1]}


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
    for panel, (region, where) in zip((axes[2], axes[5]), REGIONS.items(), strict=True):
        rows = final[final["region"] == region]
        scatter(panel, rows, "val_loss", "pr_post", hollow)
        scatter(panel, _at_rates(rows, best), "val_loss", "pr_post", styles)
        scale_by_ratio(panel, rows["pr_post"])
        panel.set_title(f"PR post, {where} (hollow: other rates)", fontsize=8)
    names = {f"{level}, best lr {best[level]:g}": style for level, style in styles.items()}
    legend(figure, names, n_columns=3)
    return figure


def mixer(sweep: Sweep) -> Figure:
    """Above, by activation of the two FFNs of a block; below, AdamW and SGD."""
    about = f"{caption(sweep)}; best rate: highest mean accuracy, of equal ones lowest loss"
    figure, axes = panels(2, 4, "MLP-Mixer on scikit-learn's digits", about, height=2.6)
    folder = sweep.runs["folder"]
    _mixer_activations(axes[:4], sweep.where(folder == "mixer_activation"))
    trained = sweep.where(folder == "mixer_optimizer").by("optimizer.name")
    styles = present(OPTIMIZERS, trained.ok)
    best = _mixer_optimizers(axes[4:], trained, styles)
    sites = {
        f"{site}, {level}": {"color": color, "linestyle": dash}
        for level, dash in MIXED.items()
        for site, color in COLORS.items()
    }
    names = {f"{level}, best lr {best[level]:g}": style for level, style in styles.items()}
    legend(figure, {**sites, **names})
    return figure


def _mixer_activations(axes: Sequence[Axes], sweep: Sweep) -> None:
    """PR of each FFN by its own activation; accuracy and PR_post by the activations of both."""
    axes[1].sharey(axes[0])
    for panel, ffn in zip(axes, FFNS, strict=False):
        layers = sweep.by(f"model.{ffn}.activation").layers
        for site, color in COLORS.items():
            lines = {level: {"color": color, "linestyle": dash} for level, dash in MIXED.items()}
            over_layers(panel, layers[layers["ffn"] == ffn], f"pr_{site}", lines)
        name_axes(panel, "layer", "pr", f"PR of {FFNS[ffn]},\nby its activation")
    scale_by_ratio(axes[0], sweep.layers[["pr_pre", "pr_post"]].stack())
    pairs = sweep.by(*(f"model.{ffn}.activation" for ffn in FFNS)).ok
    of_run = ["run_id", "level", "seed"]
    means = pairs.groupby(of_run)[["final.val_accuracy", "pr_post"]].mean().reset_index()
    levels = {f"{token} {channel}": {"color": LOSS_COLOR} for token in MIXED for channel in MIXED}
    for panel, name in zip(axes[2:], ("final.val_accuracy", "pr_post"), strict=True):
        strip(panel, means, name, levels)
        panel.set_xticks(range(len(levels)), [level.replace(" ", "\n") for level in levels])
        panel.set_xlabel("above: of token mixing,\nbelow: of channel mixing", fontsize=8)
    axes[2].set_ylabel("accuracy", fontsize=8)
    axes[2].set_title("final accuracy,\nby both activations", fontsize=8)
    axes[3].set_title("PR post, mean over all FFNs,\nby both activations", fontsize=8)


def _mixer_optimizers(axes: Sequence[Axes], sweep: Sweep, styles: Styles) -> dict[str, float]:
    """PR_post and SE_post of each FFN at the best rates, and accuracy over rates; gives these."""
    runs = sweep.ok.drop_duplicates("run_id")
    best = best_mixer_rates(runs)
    layers, points = _at_rates(sweep.layers, best), _at_rates(sweep.ok, best)
    axes[1].sharey(axes[0])
    for panel, ffn in zip(axes, FFNS, strict=False):
        over_layers(panel, layers[layers["ffn"] == ffn], "pr_post", styles)
        panel.set_title(f"PR post of {FFNS[ffn]},\nbest rates", fontsize=8)
    scale_by_ratio(axes[0], layers["pr_post"])
    levels = {f"{ffn} {level}": style for ffn in FFNS for level, style in styles.items()}
    strip(axes[2], points.assign(level=points["ffn"] + " " + points["level"]), "se_post", levels)
    ticks = [(i + 0.5) * len(styles) - 0.5 for i in range(len(FFNS))]
    axes[2].set_xticks(ticks, [name.replace(" ", "\n") for name in FFNS.values()])
    axes[2].set_title("SE post, mean over blocks,\nbest rates", fontsize=8)
    means = runs.groupby(["level", "optimizer.lr"])["final.val_accuracy"].mean()
    for level, style in styles.items():
        over_rates = means.xs(level)
        axes[3].plot(over_rates.index, over_rates, **style)
    scatter(axes[3], runs, "optimizer.lr", "final.val_accuracy", styles)
    name_axes(axes[3], "lr", "accuracy", "final accuracy, all rates")
    axes[3].set_xscale("log")
    return best


def _flagged(panel: Axes, points: pd.DataFrame) -> list[Line2D]:
    """Gray crosses, each with its level's name, for runs that cannot be compared."""
    flagged = points[(points["flag"] != "ok") & points["pr_post"].notna()]
    if flagged.empty:
        return []
    cross: dict[str, Any] = {"marker": "x", "color": FLAGGED_COLOR, "linestyle": "none"}
    panel.plot(flagged["d_ff"], flagged["pr_post"], **cross)
    for _, run in flagged.iterrows():
        panel.annotate(
            plain(run["level"]),
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
