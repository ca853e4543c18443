"""Claims 1 to 3: what the nonlinearity does to the spectrum, GELU against ReLU, and depth."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep
from judgement import NOT_RUN, Check, Finding, Table, above, counted, lower_loss, outcome
from wording import label, loss, mean, mean_perplexity, number, over_layers, perplexity, spread

SHIFTS = (("se", ">"), ("pr", ">"), ("eee", "<"))
"""Post against pre."""

PAPER_SHIFTS = {
    "gelu": ("5.57 ± 0.36 → 7.40 ± 0.60", "125 ± 45 → 860 ± 520", "0.925 → 0.45 ± 0.13"),
    "relu": ("5.45 → 7.33", "95 → 600", "0.93 → 0.505"),
}
D_MODEL = 512
PAPERS_D_MODEL = 768
TOLERANCE = 0.1
"""How far PR_post may be from its last value, relative, once it has settled."""


def reinjection(evidence: Evidence) -> Finding:
    """Claim 1: SE and PR rise and EEE falls in every layer and seed; the identity does nothing."""
    sizes = _sizes(evidence)
    sweep = sizes[D_MODEL]
    nonlinear = sweep.layers[sweep.layers["level"].isin(PAPER_SHIFTS)]
    checks = [*shift_checks(nonlinear, "GELU and ReLU, every layer and seed"), _identity(sweep)]
    at_start = sweep.all_layers
    at_start = at_start[at_start["level"].isin(PAPER_SHIFTS) & (at_start["step"] == 0)]
    counts = [("step 0", at_start), ("last step", nonlinear)]
    gated = evidence.sweep("gated_gpu") if evidence.has(["gated_gpu"]) else None
    if gated is not None:
        own = gated.where(gated.runs["ffn.gated"].astype(bool))
        counts.append((f"gated, {own.scale()}", own.layers))
    tables = [
        _shifts(sizes),
        Table(
            "Number of layers and seeds in which the shift holds",
            ["runs", *(f"{name.upper()}_post {sign} {name.upper()}_pre" for name, sign in SHIFTS)],
            [
                [title, *(check.measured for check in shift_checks(rows, ""))]
                for title, rows in counts
            ],
        ),
    ]
    if gated is not None:
        tables.append(_gated_and_plain(gated))
    measured = "; ".join(
        f"{label(level)} {', '.join(_shift(sweep, level, name) for name, _ in SHIFTS)}"
        for level in PAPER_SHIFTS
    )
    return Finding.of(measured, sweep, checks, tables)


def _gated_and_plain(sweep: Sweep) -> Table:
    gated = sweep.runs["ffn.gated"].map({True: "gated", False: "plain"})
    sweep = Sweep(sweep.runs.assign(gated=gated), sweep.metrics)
    sweep = sweep.by("gated", "activation.name", "ffn.width")
    rows = [
        [
            design,
            label(activation),
            width,
            loss(sweep.final("val_loss", level)),
            *(spread(sweep.final(name, level)) for name in ("pr_pre", "pr_post", "js")),
        ]
        for level in sorted(set(sweep.ok["level"]))
        for design, activation, width in [level.split()]
    ]
    return Table(
        f"Gated and plain FFNs, {sweep.scale()}: mean (lowest to highest seed)",
        ["FFN", "activation", "width", "loss", "PR_pre", "PR_post", "JS"],
        rows,
    )


def gelu_and_relu(evidence: Evidence) -> Finding:
    """Claim 2: loss, PR_post and SE_post of GELU and ReLU, and when PR_post has settled."""
    sizes = _sizes(evidence)
    sweep = sizes[D_MODEL]
    samples = {
        name: [(label(level), sweep.final(name, level)) for level in PAPER_SHIFTS]
        for name in ("val_loss", "pr_post", "se_post")
    }
    settled = [(label(level), settling_steps(sweep, level)) for level in PAPER_SHIFTS]
    checks = [
        lower_loss("loss: GELU < ReLU", "perplexity 2.714, 2.774", *samples["val_loss"]),
        above("PR_post, mean over layers: GELU > ReLU", "860, 600", *samples["pr_post"]),
        above("SE_post, mean over layers: GELU > ReLU", "7.40, 7.33", *samples["se_post"]),
        above(
            f"first step from which PR_post stays within {TOLERANCE:.0%} of its end: GELU > ReLU",
            "ReLU earlier",
            *settled,
        ),
    ]
    rows = [
        [
            label(level),
            f"{d_model:g}",
            perplexity(own.final("val_loss", level)),
            spread(own.final("pr_post", level)),
            spread(own.final("se_post", level)),
            spread(settling_steps(own, level)),
            str(len(own.final("val_loss", level))),
        ]
        for d_model, own in sizes.items()
        for level in PAPER_SHIFTS
    ]
    header = ["activation", "d_model", "perplexity", "PR_post", "SE_post", "settled at step"]
    losses, dimensions = (
        ", ".join(f"{name} {text(values)}" for name, values in samples[metric])
        for metric, text in (("val_loss", mean_perplexity), ("pr_post", mean))
    )
    return Finding.of(
        f"perplexity {losses}; PR_post {dimensions}",
        sweep,
        checks,
        [Table("By size: mean (lowest to highest seed)", [*header, "seeds"], rows)],
    )


def depth_band(evidence: Evidence) -> Finding:
    """Claim 3: JS of GELU peaks in layers 1 to 5, and is below half the peak at both ends."""
    sweep = _sizes(evidence)[D_MODEL]
    js = sweep.by_layer("js", "gelu")
    if js.empty:
        return NOT_RUN
    peak = js.max(axis=1)
    layer = js.idxmax(axis=1)
    checks = [
        counted("the peak lies in layers 1 to 5, in every seed", "2 to 4", layer.between(1, 5)),
        counted("JS of layer 0 < half the peak, in every seed", "low", js[0] < peak / 2),
        counted(
            "JS of the last layer < half the peak, in every seed",
            "–",
            js[js.columns[-1]] < peak / 2,
        ),
    ]
    layers = ", ".join(map(str, sorted(set(layer))))
    return Finding.of(
        f"GELU: peak {mean(peak)} in layer {layers}; layer 0 {mean(js[0])}, "
        f"last layer {mean(js[js.columns[-1]])}",
        sweep,
        checks,
        [by_layer(sweep, "js", PAPER_SHIFTS, "JS by layer, mean over seeds")],
    )


def shift_checks(layers: pd.DataFrame, where: str) -> list[Check]:
    """In how many rows SE and PR rise and EEE falls from pre to post; it must be all."""
    return [
        counted(
            f"{name.upper()}_post {sign} {name.upper()}_pre: {where}",
            {">": "rise", "<": "fall"}[sign],
            (layers[f"{name}_post"] - layers[f"{name}_pre"]) * (1 if sign == ">" else -1) > 0,
        )
        for name, sign in SHIFTS
    ]


def by_layer(sweep: Sweep, name: str, levels: Iterable[str], title: str) -> Table:
    """A metric of designs over depth, the mean over seeds."""
    profiles = {level: sweep.by_layer(name, level).mean() for level in levels}
    layers = next(iter(profiles.values())).index
    rows = [
        [label(level), *(number(profile.get(layer, np.nan)) for layer in layers)]
        for level, profile in profiles.items()
    ]
    return Table(title, ["layer", *map(str, layers)], rows)


def settling_steps(sweep: Sweep, level: str) -> list[float]:
    """The first step of each seed from which the mean PR_post stays near its last value."""
    curves = sweep.curves[sweep.curves["level"] == level].sort_values(["seed", "step"])
    steps = []
    for _, curve in curves.groupby("seed"):
        ratio = curve["pr_post"].to_numpy() / curve["pr_post"].iloc[-1]
        away = np.flatnonzero(np.abs(ratio - 1) > TOLERANCE)
        steps.append(float(curve["step"].iloc[away[-1] + 1 if len(away) else 0]))
    return steps


def _identity(sweep: Sweep) -> Check:
    rows = sweep.layers[sweep.layers["level"] == "identity"]
    if rows.empty:
        return Check("identity: pre = post and JS = 0", "control", "–", "not run")
    largest = max(
        (rows[f"{name}_post"] / rows[f"{name}_pre"] - 1).abs().max() for name, _ in SHIFTS
    )
    return Check(
        "identity: pre and post differ by less than 1e-9 of their size, and JS = 0",
        "control",
        f"largest difference {largest:.1g}, largest JS {rows['js'].max():.1g}",
        outcome(largest < 1e-9 and (rows["js"] == 0).all()),
    )


def _shifts(sizes: Mapping[int, Sweep]) -> Table:
    rows = []
    for level, paper in PAPER_SHIFTS.items():
        rows.append([label(level), "paper", *paper])
        for d_model, sweep in sizes.items():
            if len(sweep.final("se_pre", level)):
                shifts = (_shift(sweep, level, name, True) for name, _ in SHIFTS)
                rows.append([label(level), f"d_model {d_model:g}", *shifts])
    return Table(
        "Before → after the nonlinearity at the last step, mean ± SD over layers",
        ["activation", "runs", "SE", "PR", "EEE"],
        rows,
    )


def _shift(sweep: Sweep, level: str, name: str, with_sd: bool = False) -> str:
    sides = [sweep.by_layer(f"{name}_{site}", level).mean() for site in ("pre", "post")]
    texts = [over_layers(side) if with_sd else number(side.mean()) for side in sides]
    return " → ".join(texts) if with_sd else f"{name.upper()} {' → '.join(texts)}"


def _sizes(evidence: Evidence) -> dict[int, Sweep]:
    """The runs of each d_model, which no mean pools."""
    everything = evidence.sweep("activation_gpu").by("activation.name")
    d_model = everything.runs["model.d_model"]
    present = [size for size in (D_MODEL, PAPERS_D_MODEL) if size in set(d_model)]
    return {size: everything.where(d_model == size) for size in present}
