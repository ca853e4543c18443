"""Claims 11 and 12: what the optimizer leaves for the nonlinearity to do, and the middle layers."""

from itertools import pairwise

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep, last_step
from judgement import Check, Finding, Table, above, decided, descending, lower_loss, outcome
from wording import Values, label, loss, mean, mean_perplexity, number, perplexity, spread

from nerve import average_seeds, correlate_across_runs, metrics_at_loss

THREE = ("adamw", "dion", "muon")
"""The optimizers that the paper compares."""


def repair_and_refinement(evidence: Evidence) -> Finding:
    """Claim 11: PR gain, EEE_post, PR_pre and loss at the best rates, and metrics at equal loss."""
    sweep = evidence.sweep("optimizer_gpu").by("optimizer.name")
    rates = best_rates(sweep)
    best = at_rates(sweep, rates)
    at_loss = _at_loss(best)
    gain = {level: _largest_gain(best, level) for level in THREE}
    eee = {level: best.final("eee_post", level) for level in THREE}
    pre = {level: _first_half(best, level) for level in THREE[::-1]}
    losses = {level: best.final("val_loss", level) for level in THREE[::-1]}
    checks = [
        *_falling("largest PR gain over layers", gain, ["79, 20", "20, 7.4"]),
        *_falling("EEE_post, mean over layers", eee, ["0.72, 0.555", "0.555, 0.54"]),
        *_falling(
            "PR_pre, mean of the first half of the layers",
            pre,
            ["Muon 117 to 208, AdamW 5 to 13 (layers 0 to 9 of 24)"] * 2,
        ),
        *(
            lower_loss(
                f"loss: {label(first)} < {label(second)}",
                "perplexity Muon 25.68, Dion 27.68, AdamW 33.24",
                (label(first), losses[first]),
                (label(second), losses[second]),
            )
            for first, second in pairwise(losses)
        ),
        *_checks_at_loss(*at_loss),
    ]
    measured = "; ".join(
        f"{label(level)} PR gain {mean(gain[level])}, perplexity {mean_perplexity(losses[level])}"
        for level in THREE
    )
    tables = [
        _table_of_rates(sweep, rates),
        _table_of_best(best, rates, "At the best rate"),
        _table_at_loss(*at_loss),
    ]
    if evidence.has(["optimizer"]):
        small = evidence.sweep("optimizer").by("optimizer.name")
        small_rates = best_rates(small)
        title = f"{small.scale()}, at the rates of conf/optimizer, for Adafactor the best of five"
        tables.append(_table_of_best(at_rates(small, small_rates), small_rates, title))
    return Finding.of(measured, _three(best), checks, tables)


def middle_layers(evidence: Evidence) -> Finding:
    """Claim 12: which mean of PR_post orders the optimizers, and correlates, as the loss does."""
    sweep = evidence.sweep("optimizer_gpu").by("optimizer.name")
    best = at_rates(sweep, best_rates(sweep))
    means = {
        "loss": {level: best.final("val_loss", level) for level in THREE},
        "middle": {level: best.middle("pr_post", level) for level in THREE},
        "all": {level: best.final("pr_post", level) for level in THREE},
    }
    orders = {name: descending(samples) for name, samples in means.items()}
    by_loss = orders["loss"][::-1]
    texts = {
        name: " > ".join(f"{label(level)} {mean(samples[level])}" for level in orders[name]) or "–"
        for name, samples in means.items()
    }
    seeds = means["loss"].values()
    table = _correlations(sweep)
    middle, every = table["spearman"].reindex(["pr_post_middle", "pr_post"]).to_numpy(float)
    correlated = np.isfinite([middle, every]).all()
    checks = [
        Check(
            "the order of PR_post of the middle third is that of falling loss",
            "Muon, Dion, AdamW in layers 8 to 14 of 24",
            f"{texts['middle']}; loss {texts['loss']}",
            decided(seeds, orders["middle"] == by_loss),
        ),
        Check(
            "the order of PR_post of all layers is not",
            "Dion 873, Muon 771, AdamW 576",
            texts["all"],
            decided(seeds, orders["all"] != by_loss),
        ),
        Check(
            "over all optimizers and rates, Spearman's r of loss and PR_post: middle third < all "
            "layers",
            "–",
            f"{middle:.2f}, {every:.2f} (n = {table.loc['pr_post', 'n']})" if correlated else "–",
            outcome(middle < every) if correlated else "not run",
        ),
    ]
    return Finding.of(
        f"PR_post of all layers {texts['all']}; of the middle third {texts['middle']}",
        _three(best),
        checks,
        [_table_of_regions(best)],
    )


def best_rates(sweep: Sweep) -> dict[str, float]:
    """The rate of each optimizer with the lowest final loss at seed 0."""
    first = sweep.ok[sweep.ok["seed"] == 0].sort_values("val_loss").drop_duplicates("level")
    return dict(zip(first["level"], first["optimizer.lr"], strict=True))


def at_rates(sweep: Sweep, rates: dict[str, float]) -> Sweep:
    """The runs at these rates, all seeds."""
    return sweep.where(sweep.runs["optimizer.lr"] == sweep.runs["level"].map(rates))


def _three(best: Sweep) -> Sweep:
    return best.where(best.runs["level"].isin(THREE))


def _largest_gain(best: Sweep, level: str) -> pd.Series:
    return best.by_layer("pr_gain", level).max(axis=1)


def _first_half(best: Sweep, level: str) -> pd.Series:
    layers = best.by_layer("pr_pre", level)
    return layers.iloc[:, : layers.shape[1] // 2].mean(axis=1)


def _falling(quantity: str, samples: dict[str, Values], paper: list[str]) -> list[Check]:
    """Each design above the next one; `paper` has a text for each pair."""
    return [
        above(
            f"{quantity}: {label(first)} > {label(second)}",
            reported,
            (label(first), samples[first]),
            (label(second), samples[second]),
        )
        for (first, second), reported in zip(pairwise(samples), paper, strict=True)
    ]


def _at_loss(best: Sweep) -> tuple[float, pd.DataFrame]:
    """The highest final loss of the runs of the three, and where each run passes it."""
    three = _three(best)
    target = metrics_at_loss(three.metrics, three.runs)["target_loss"].max()
    if not np.isfinite(target):
        return target, best.ok.iloc[:0]
    points = metrics_at_loss(best.metrics, best.runs, ["level"], loss=target)
    return target, points[(points["flag"] == "ok") & points["reached"]]


def _checks_at_loss(target: float, points: pd.DataFrame) -> list[Check]:
    def sample(name: str, level: str) -> tuple[str, Values]:
        rows = points[points["level"] == level]
        return label(level), rows.sort_values("seed")[name].to_numpy(float)

    where = f"at equal loss ({number(target, 4)}, interpolated)"
    return [
        above(
            f"PR_pre {where}: Muon > AdamW",
            "–",
            sample("pr_pre", "muon"),
            sample("pr_pre", "adamw"),
        ),
        above(f"JS {where}: AdamW > Muon", "–", sample("js", "adamw"), sample("js", "muon")),
    ]


def _table_of_rates(sweep: Sweep, rates: dict[str, float]) -> Table:
    rows = []
    for (level, rate), points in sweep.points.groupby(["level", "optimizer.lr"]):
        ok = points[points["flag"] == "ok"].sort_values("seed")
        flags = ", ".join(sorted(points.loc[points["flag"] != "ok", "flag"]))
        is_best = rates.get(level) == rate
        rows.append(
            [
                label(level),
                f"**{rate:g}**" if is_best else f"{rate:g}",
                number(ok.loc[ok["seed"] == 0, "val_loss"].mean(), 4),
                loss(ok["val_loss"].to_numpy(float)),
                str(len(ok)),
                flags or "–",
            ]
        )
    return Table(
        "Loss by optimizer and learning rate; bold: the lowest loss of the optimizer at seed 0",
        ["optimizer", "rate", "seed 0", "all seeds", "seeds", "flagged runs"],
        rows,
    )


def _table_of_best(best: Sweep, rates: dict[str, float], title: str) -> Table:
    order = sorted(rates, key=lambda level: best.final("val_loss", level).mean())
    rows = [
        [
            label(level),
            f"{rates[level]:g}",
            perplexity(best.final("val_loss", level)),
            spread(_largest_gain(best, level)),
            spread(best.final("eee_post", level)),
            spread(_first_half(best, level)),
            str(len(best.final("val_loss", level))),
        ]
        for level in order
    ]
    header = ["optimizer", "rate", "perplexity", "largest PR gain", "EEE_post"]
    return Table(
        f"{title}: mean (lowest to highest seed)",
        [*header, "PR_pre, first half", "seeds"],
        rows,
    )


def _table_at_loss(target: float, points: pd.DataFrame) -> Table:
    rows = [
        [
            label(level),
            spread(own["step"].to_numpy(float)),
            *(spread(own[name].to_numpy(float)) for name in ("pr_pre", "pr_gain", "js")),
            str(len(own)),
        ]
        for level, own in points.groupby("level")
    ]
    return Table(
        f"Where the loss crosses {number(target, 4)}, the highest final loss of AdamW, Dion and "
        "Muon, interpolated between measured steps",
        ["optimizer", "step", "PR_pre", "PR gain", "JS", "seeds"],
        rows,
    )


def _correlations(sweep: Sweep) -> pd.DataFrame:
    """Over designs: loss with PR_post of all layers and of the middle third."""
    middle = last_step(sweep.means[sweep.means["region"] == "middle"])
    middle = middle[["run_id", "pr_post"]].rename(columns={"pr_post": "pr_post_middle"})
    designs = average_seeds(sweep.points.merge(middle, on="run_id", how="left"))
    names = ["pr_post", "pr_post_middle"]
    return correlate_across_runs(designs, names=names).set_index("metric")


def _table_of_regions(best: Sweep) -> Table:
    levels = sorted(set(best.ok["level"]), key=lambda level: best.final("val_loss", level).mean())
    rows = [
        [
            label(level),
            loss(best.final("val_loss", level)),
            spread(best.middle("pr_post", level)),
            spread(best.final("pr_post", level)),
        ]
        for level in levels
    ]
    return Table(
        "PR_post at the best rate, by loss: mean (lowest to highest seed)",
        ["optimizer", "loss", "middle third", "all layers"],
        rows,
    )
