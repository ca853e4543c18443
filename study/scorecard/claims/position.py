"""Claims 9 and 10: where the norm stands, and what encodes positions."""

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep
from judgement import Check, Finding, Outcome, Table, above, lower_loss, outcome
from wording import interval, label, loss, mean, mean_perplexity, number, perplexity, spread

from nerve import fit_width_scaling

PLACEMENTS = ("pre", "mix", "post")
SETTING = {"optimizer.lr": 5e-4, "optimizer.schedule.warmup": 0.2}
"""In which all placements are compared."""

WIDTHS = (8, 4)
"""Where one seed decides: the widest, if the next agrees."""

POSITIONS = ("rope", "learned", "none")


def norm_placement(evidence: Evidence) -> Finding:
    """Claim 9: PR_post of the placements at width 8, and its exponent over d_ff."""
    everything = evidence.sweep("norm_placement_gpu").by("normalization.placement", "ffn.width")
    sweep = in_setting(everything)
    checks = [
        _at_both_widths(sweep, "pre", "mix", "1822, 233"),
        _at_both_widths(sweep, "mix", "post", "233, 71"),
        _exponents(sweep),
    ]
    measured = ", ".join(
        f"{label(place)} {mean(sweep.final('pr_post', f'{place} {WIDTHS[0]}'))}"
        for place in PLACEMENTS
    )
    tables = [_placements(everything)]
    if evidence.has(["norm_placement"]):
        smaller = evidence.sweep("norm_placement")
        tables.append(_placements(smaller.by("normalization.placement", "ffn.width")))
    if evidence.has(["residual"]):
        tables.append(_residual(evidence.sweep("residual").by("normalization.placement")))
    return Finding.of(f"PR_post at width {WIDTHS[0]}: {measured}", sweep, checks, tables)


def position(evidence: Evidence) -> Finding:
    """Claim 10: loss, and PR_post of the middle and the last third, with RoPE and without."""
    sweep = evidence.sweep("position_gpu").by("position.name")
    samples = {
        level: {
            "loss": sweep.final("val_loss", level),
            "all": sweep.final("pr_post", level),
            "middle": sweep.middle("pr_post", level),
            "last": _last_third(sweep, level),
        }
        for level in POSITIONS
    }
    rope, none = samples["rope"], samples["none"]
    checks = [
        lower_loss(
            "loss: RoPE < none",
            "perplexity 15.20, 16.78",
            ("RoPE", rope["loss"]),
            ("none", none["loss"]),
        ),
        *(
            above(
                f"PR_post of the {region} third of the layers: RoPE > none",
                "no collapse with RoPE",
                ("RoPE", rope[region]),
                ("none", none[region]),
            )
            for region in ("middle", "last")
        ),
    ]
    rows = [
        [
            label(level),
            perplexity(own["loss"]),
            *(spread(own[region]) for region in ("all", "middle", "last")),
            str(len(own["loss"])),
        ]
        for level, own in samples.items()
    ]
    header = ["position", "perplexity", "PR_post, all layers", "middle third", "last third"]
    table = Table("Mean (lowest to highest seed)", [*header, "seeds"], rows)
    measured = ", ".join(
        f"{label(level)} {mean_perplexity(own['loss'])}" for level, own in samples.items()
    )
    return Finding.of(f"perplexity {measured}", sweep, checks, [table])


def in_setting(sweep: Sweep) -> Sweep:
    """The runs in which the placements are compared."""
    return sweep.where((sweep.runs[list(SETTING)] == SETTING).all(axis=1))


def _at_both_widths(sweep: Sweep, greater: str, less: str, paper: str) -> Check:
    pairs = [
        [sweep.final("pr_post", f"{place} {width}") for place in (greater, less)]
        for width in WIDTHS
    ]
    texts = [
        f"width {width}: "
        + ", ".join(_value_or_flag(sweep, f"{place} {width}") for place in (greater, less))
        for width in WIDTHS
    ]
    return Check(
        f"PR_post at width {WIDTHS[0]}: {label(greater)} > {label(less)} (one seed: decided if "
        f"width {WIDTHS[1]} agrees)",
        paper,
        "; ".join(texts),
        _agreed(pairs),
    )


def _value_or_flag(sweep: Sweep, level: str) -> str:
    """PR_post, or why no run of the design can be compared."""
    values = sweep.final("pr_post", level)
    flags = sorted(set(sweep.points.loc[sweep.points["level"] == level, "flag"]))
    return spread(values) if len(values) or not flags else ", ".join(flags)


def _agreed(pairs: list[list[np.ndarray]]) -> Outcome:
    """Of the widest, where it can be decided by its seeds or by the other width."""
    if not all(map(len, pairs[0])):
        return "not run"
    if not all(map(len, pairs[1])):
        return "one seed"
    holds = [min(first) > max(second) for first, second in pairs]
    return outcome(holds[0]) if holds[0] == holds[1] else "one seed"


def _exponents(sweep: Sweep) -> Check:
    points = sweep.points.assign(place=sweep.points["level"].str.split().str[0])
    fits = fit_width_scaling(points, ["place"], names=["pr_post"]).set_index("place")
    columns = ["exponent", "exponent_low", "exponent_high"]
    found = {
        place: fits.loc[place, columns].astype(float) if place in fits.index else None
        for place in PLACEMENTS
    }
    texts = [f"{label(place)} {interval(*fit)}" for place, fit in found.items() if fit is not None]
    pre, post = found["pre"], found["post"]
    decided = pre is not None and post is not None and np.isfinite([*pre, *post]).all()
    return Check(
        "exponent of PR_post over d_ff: PreLN > PostLN, and their 95% intervals do not overlap",
        "diminishing returns",
        ", ".join(texts),
        outcome(pre["exponent_low"] > post["exponent_high"]) if decided else "not run",
    )


def _placements(everything: Sweep) -> Table:
    points = everything.points
    parts = points["level"].str.split(expand=True)
    order = parts[0].map({place: i for i, place in enumerate(PLACEMENTS)})
    points = points.assign(place=parts[0], width=parts[1].astype(float), order=order)
    rows = [
        [
            label(point["place"]),
            f"{point['width']:g}",
            f"{point['optimizer.lr']:g}",
            f"{point['optimizer.schedule.warmup']:g}",
            str(point["seed"]),
            number(point["val_loss"], 4),
            number(point["pr_post"]),
            number(point["pr_post_fraction"]),
            point["flag"],
        ]
        for _, point in points.sort_values(["order", "optimizer.lr", "width", "seed"]).iterrows()
    ]
    header = ["placement", "width", "learning rate", "warm-up", "seed", "loss", "PR_post"]
    return Table(
        f"Every run of {everything.scale()}, including those that cannot be compared (flag); "
        "warm-up as a share of the steps",
        [*header, "PR_post / d_ff", "flag"],
        rows,
    )


def _residual(sweep: Sweep) -> Table:
    names = ("pr_pre", "pr_post", "se_pre", "se_post", "js")
    rows = [
        [
            label(level),
            loss(sweep.final("val_loss", level)),
            *(spread(sweep.final(name, level)) for name in names),
            str(len(sweep.final("val_loss", level))),
        ]
        for level in ("pre", "pre_residual_after_norm")
    ]
    return Table(
        f"Where the residual branches off, {sweep.scale()}, at 3e-3: mean (lowest to highest seed)",
        ["placement", "loss", *map(label, names), "seeds"],
        rows,
    )


def _last_third(sweep: Sweep, level: str) -> pd.Series:
    """PR_post of each seed, averaged over the layers in the last third of the depth."""
    rows = sweep.layers[(sweep.layers["level"] == level) & (sweep.layers["depth"] > 2 / 3)]
    return rows.groupby("seed")["pr_post"].mean()
