"""Claims 6 to 8: what the nonlinearities do without norms, and what weight geometry does for it."""

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep
from judgement import (
    Check,
    Finding,
    Table,
    above,
    counted,
    decided,
    descending,
    lower_loss,
    outcome,
)
from wording import label, loss, mean, mean_perplexity, number, perplexity, spread

from claims.nonlinearity import by_layer

NORMS = {"layernorm": "PreLN", "none": "norm-free"}
ACTIVATIONS = ("gelu", "relu", "learnable_leaky_relu")
EARLY = range(7)
CONSTRAINTS = ("spectral_norm", "weight_norm", "hyperspherical", "none")


def inertia(evidence: Evidence) -> Finding:
    """Claim 6: EEE_post, JS and PR gain of norm-free GELU in layers 0 to 6, and its loss."""
    sweep = named(evidence.sweep("normfree_gpu"))
    gelu = "norm-free GELU"
    profiles = {name: sweep.by_layer(name, gelu).mean() for name in ("eee_post", "js", "pr_gain")}
    early = {name: profile[profile.index.isin(EARLY)] for name, profile in profiles.items()}
    eee, js, gain = early["eee_post"], early["js"], early["pr_gain"]
    losses = [
        lower_loss(
            f"loss: {other} < {gelu}",
            paper,
            (other, sweep.final("val_loss", other)),
            (gelu, sweep.final("val_loss", gelu)),
        )
        for other, paper in (
            ("norm-free ReLU", "perplexity 2.988, 3.223"),
            ("PreLN GELU", "perplexity 2.714, 3.223"),
        )
    ]
    checks = [
        _extreme(
            "EEE_post ≥ 0.95 in each of layers 0 to 6", "0.95 to 1", eee, eee >= 0.95, "lowest"
        ),
        _extreme("JS ≤ 0.05 in each of layers 0 to 6", "near 0", js, js <= 0.05, "highest"),
        _extreme("PR gain ≤ 2 in each of layers 0 to 6", "near 1", gain, gain <= 2, "highest"),
        *losses,
    ]
    rows = [
        [label(name), *(number(value) for value in profile)] for name, profile in profiles.items()
    ]
    variances = [sweep.by_layer(f"variance_{site}", gelu) for site in ("post", "pre")]
    ratio = (variances[0] / variances[1]).mean()
    rows.append(["variance after / before", *(number(value) for value in ratio)])
    rows += [
        [f"SD of u, {name}", *(number(value) for value in deviation(sweep, name))]
        for name in (gelu, "norm-free ReLU", "PreLN GELU")
    ]
    layers = [str(layer) for layer in profiles["js"].index]
    table = Table(
        "Norm-free GELU by layer at the last step, mean over seeds; SD of u: √(Σλ / d_ff), the "
        "standard deviation of the inputs of the nonlinearity",
        ["layer", *layers],
        rows,
    )
    return Finding.of(
        f"in layers 0 to 6 EEE_post {_range(eee)}, JS {_range(js)}, PR gain {_range(gain)}; "
        f"perplexity {mean_perplexity(sweep.final('val_loss', gelu))}",
        sweep,
        checks,
        [table, _losses(sweep), *_rates(evidence)],
    )


def overcompensation(evidence: Evidence) -> Finding:
    """Claim 7: largest PR gain and JS over layers, and where, with norms and without."""
    sweep = named(evidence.sweep("normfree_gpu"))
    gains, places, divergences, parts = [], [], [], []
    for name in map(label, ACTIVATIONS[1:]):
        free, normed = f"norm-free {name}", f"PreLN {name}"
        gain = sweep.by_layer("pr_gain", free)
        at = gain.idxmax(axis=1)
        gains.append(
            above(
                f"largest PR gain over layers: {free} > {normed}",
                "up to 290",
                (free, gain.max(axis=1)),
                (normed, sweep.by_layer("pr_gain", normed).max(axis=1)),
            )
        )
        criterion = f"it lies in layers 0 to 3, in every seed: {free}"
        places.append(counted(criterion, "layer 1", at.isin(range(4))))
        divergences.append(
            above(
                f"largest JS over layers: {free} > {normed}",
                "up to 0.48",
                (free, sweep.by_layer("js", free).max(axis=1)),
                (normed, sweep.by_layer("js", normed).max(axis=1)),
            )
        )
        layers = ", ".join(map(str, sorted(set(at))))
        parts.append(f"{name}: PR gain {mean(gain.max(axis=1))} in layer {layers or '–'}")
    tables = [
        by_layer(
            sweep,
            metric,
            _names(*NORMS.values()),
            f"{label(metric)} by layer at the last step, mean over seeds",
        )
        for metric in ("pr_gain", "js")
    ]
    return Finding.of(
        "; ".join(parts), sweep, [*gains, *places, *divergences, _both_below(sweep)], tables
    )


def constraints(evidence: Evidence) -> Finding:
    """Claim 8: the order of losses, and whether that of EEE_post is the same."""
    sweep = evidence.sweep("ffn_constraint_gpu", "normfree_gpu")
    runs = sweep.runs
    norm_free_gelu = (runs["normalization.kind"] == "none") & (runs["activation.name"] == "gelu")
    sweep = sweep.where(norm_free_gelu).by("ffn.constraint")
    losses = {level: sweep.final("val_loss", level) for level in CONSTRAINTS}
    flatness = {level: sweep.final("eee_post", level) for level in CONSTRAINTS}
    neighbors = [
        lower_loss(
            f"loss: {label(first)} < {label(second)}",
            paper,
            (label(first), losses[first]),
            (label(second), losses[second]),
        )
        for first, second, paper in (
            ("spectral_norm", "weight_norm", "perplexity 3.000, 3.041"),
            ("weight_norm", "hyperspherical", "perplexity 3.041, 3.122"),
        )
    ]
    criterion = "the order of loss is that of EEE_post, lowest with lowest, over all four"
    orders = [descending(values)[::-1] for values in (losses, flatness)]
    texts = [", ".join(map(label, order)) for order in orders]
    order = Check(
        criterion,
        "the same",
        f"loss: {texts[0]}; EEE_post: {texts[1]}" if all(orders) else "–",
        decided(losses.values(), orders[0] == orders[1]),
    )
    rows = [
        [
            label(level),
            loss(losses[level]),
            spread(flatness[level]),
            spread(sweep.final("pr_post", level)),
            str(len(losses[level])),
        ]
        for level in CONSTRAINTS
    ]
    header = ["constraint", "loss", "EEE_post", "PR_post", "seeds"]
    table = Table(
        "Norm-free GELU: mean (lowest to highest seed) of means over layers", header, rows
    )
    measured = ", ".join(
        f"{label(level)} {mean_perplexity(losses[level])}" for level in CONSTRAINTS
    )
    return Finding.of(f"perplexity {measured}", sweep, [*neighbors, order], [table])


def _names(*norms: str) -> list[str]:
    """The designs by activation and norms."""
    return [f"{norm} {label(name)}" for name in ACTIVATIONS for norm in norms]


def named(sweep: Sweep) -> Sweep:
    """With `norm-free GELU` and so on as level."""
    norms = sweep.runs["normalization.kind"].map(NORMS)
    names = sweep.runs["activation.name"].map(label)
    return Sweep(sweep.runs.assign(level=norms + " " + names), sweep.metrics)


def deviation(sweep: Sweep, level: str) -> pd.Series:
    """√(Σλ / d_ff) before the nonlinearity by layer, the mean over seeds."""
    (d_ff,) = sweep.ok["d_ff"].unique()
    return np.sqrt(sweep.by_layer("variance_pre", level) / d_ff).mean()


def _extreme(criterion: str, paper: str, values: pd.Series, holds: pd.Series, side: str) -> Check:
    if not len(values):
        return Check(criterion, paper, "–", "not run")
    layer = values.idxmin() if side == "lowest" else values.idxmax()
    measured = f"{side} {number(values[layer])} in layer {layer}; {holds.sum()} of {len(holds)}"
    return Check(criterion, paper, measured, outcome(holds.all()))


def _range(values: pd.Series) -> str:
    return f"{number(values.min())} to {number(values.max())}"


def _both_below(sweep: Sweep) -> Check:
    """Both losses below norm-free GELU's: their highest decides."""
    names = _names("norm-free")
    samples = [sweep.final("val_loss", name) for name in names]
    gelu, *others = samples
    below = all(map(len, samples)) and max(map(max, others)) < min(gelu)
    return Check(
        "loss: norm-free ReLU and learnable leaky ReLU < norm-free GELU",
        "perplexity 2.988, 3.081, 3.223",
        ", ".join(f"{name} {loss(values)}" for name, values in zip(names, samples, strict=True)),
        decided(samples, below),
    )


def _rates(evidence: Evidence) -> list[Table]:
    """Norm-free GELU and ReLU at further learning rates, where these were run."""
    if not evidence.has(["normfree_rates_gpu"]):
        return []
    sweep = named(evidence.sweep("normfree_gpu", "normfree_rates_gpu"))
    points = sweep.ok[(sweep.ok["seed"] == 0) & sweep.ok["level"].isin(_names("norm-free")[:2])]
    layers = sweep.layers.groupby("run_id", observed=True)
    rows = [
        [
            point["level"],
            f"{point['optimizer.lr']:g}",
            number(point["val_loss"], 4),
            *(number(layers[name].max()[point["run_id"]]) for name in ("pr_gain", "js")),
        ]
        for _, point in points.sort_values(["level", "optimizer.lr"]).iterrows()
    ]
    header = ["design", "rate", "loss", "largest PR gain", "largest JS"]
    return [Table("By learning rate, seed 0", header, rows)]


def _losses(sweep: Sweep) -> Table:
    rows = [
        [
            name,
            loss(sweep.final("val_loss", name)),
            perplexity(sweep.final("val_loss", name)),
            str(len(sweep.final("val_loss", name))),
        ]
        for name in _names(*NORMS.values())
    ]
    return Table(
        "Loss: mean (lowest to highest seed)", ["design", "loss", "perplexity", "seeds"], rows
    )
