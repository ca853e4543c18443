"""Claims 13 and 14: the two nonlinearities of an MLP-Mixer, and SGD against AdamW."""

from collections.abc import Mapping
from itertools import product

import numpy as np
import pandas as pd
from evidence import Evidence
from judgement import Check, Finding, Table, above, decided
from wording import Values, label, loss, mean, number, spread

from claims.nonlinearity import shift_checks

ACTIVATIONS = ("gelu", "relu")
FFNS = ("token_mixing", "channel_mixing")
ACCURACY = "final.val_accuracy"
REPORTED = {
    ("gelu", "gelu"): 66.96,
    ("relu", "gelu"): 67.86,
    ("gelu", "relu"): 66.99,
    ("relu", "relu"): 67.20,
}
"""Accuracy in percent by activation of token mixing and of channel mixing."""


def mixer_activations(evidence: Evidence) -> Finding:
    """Claim 13: the shifts in every FFN, and which activation accuracy and PR_post depend on."""
    columns = [f"model.{ffn}.activation" for ffn in FFNS]
    sweep = evidence.sweep("mixer_activation").by(*columns)
    accuracy = {cell: sweep.final(ACCURACY, " ".join(cell), FFNS[0]) for cell in REPORTED}
    dimensions = {
        cell: np.mean([sweep.final("pr_post", " ".join(cell), ffn) for ffn in FFNS], axis=0)
        for cell in REPORTED
    }
    paper = "token {:+.2f}, channel {:+.2f} points, from its four accuracies".format(
        *(effect({cell: [value] for cell, value in REPORTED.items()}, i)[0] for i in range(2))
    )
    points = {cell: 100 * values for cell, values in accuracy.items()}
    checks = [
        *shift_checks(sweep.layers, "every block, FFN and seed"),
        _larger_effect("accuracy, points", paper, points),
        _larger_effect("PR_post, mean over all FFNs", "–", dimensions),
    ]
    rows = [
        [
            *map(label, cell),
            f"{REPORTED[cell]:.2f}%",
            _percents(accuracy[cell]),
            *(spread(sweep.final("pr_post", " ".join(cell), ffn)) for ffn in FFNS),
            str(len(accuracy[cell])),
        ]
        for cell in REPORTED
    ]
    header = ["token mixing", "channel mixing", "paper's accuracy", "accuracy"]
    header += [f"PR_post, {label(ffn)}" for ffn in FFNS]
    table = Table("Mean (lowest to highest seed)", [*header, "seeds"], rows)
    measured = ", ".join(
        f"{'/'.join(map(label, cell))} {mean(100 * values, 4)}"
        for cell, values in accuracy.items()
        if len(values)
    )
    return Finding.of(f"accuracy token/channel: {measured}", sweep, checks, [table])


def mixer_optimizers(evidence: Evidence) -> Finding:
    """Claim 14: SE_post, PR_post and accuracy of SGD and AdamW, each at its best rate."""
    sweep = evidence.sweep("mixer_optimizer").by("optimizer.name")
    points = sweep.ok[sweep.ok["ffn"] == FFNS[0]]
    rates = best_rates(points)
    best = sweep.where(sweep.runs["optimizer.lr"] == sweep.runs["level"].map(rates))
    checks = [
        above(
            f"{label(name)} of {label(ffn)}: SGD > AdamW",
            "higher",
            *((label(level), best.final(name, level, ffn)) for level in ("sgd", "adamw")),
        )
        for name, ffn in product(("se_post", "pr_post"), FFNS)
    ]
    accuracy = [(label(level), best.final(ACCURACY, level, FFNS[0])) for level in ("sgd", "adamw")]
    checks.append(above("accuracy: SGD > AdamW", "68.07, 66.96", *accuracy, wording=_percents))
    rows = [
        [
            label(level),
            f"**{rate:g}**" if rates[level] == rate else f"{rate:g}",
            _percents(own[ACCURACY].to_numpy(float)),
            loss(own["val_loss"].to_numpy(float)),
            str(len(own)),
        ]
        for (level, rate), own in points.groupby(["level", "optimizer.lr"])
    ]
    table = Table(
        "By optimizer and learning rate: mean (lowest to highest seed); bold: the highest mean "
        "accuracy and, among equal ones, the lowest loss",
        ["optimizer", "rate", "accuracy", "loss", "seeds"],
        rows,
    )
    measured = ", ".join(f"{name} {mean(100 * values, 4)}" for name, values in accuracy)
    return Finding.of(f"accuracy {measured}", best, checks, [table])


def best_rates(points: pd.DataFrame) -> dict[str, float]:
    """The rate of each optimizer with the highest mean accuracy; of equal ones the lowest loss."""
    means = points.groupby(["level", "optimizer.lr"])[[ACCURACY, "val_loss"]].mean().reset_index()
    # Accuracies are counts of few images, in float32: rounding must not tell equal ones apart.
    means[ACCURACY] = means[ACCURACY].round(6)
    means = means.sort_values([ACCURACY, "val_loss"], ascending=[False, True])
    best = means.drop_duplicates("level")
    return dict(zip(best["level"], best["optimizer.lr"], strict=True))


def effect(cells: Mapping[tuple[str, str], Values], factor: int) -> tuple[float, float]:
    """GELU less ReLU in one factor, the mean over the other, and its standard error.

    The difference of the means of two cells each; with s² the variance within cells, pooled, its
    standard error is s/2 · √Σ 1/n over the four cells.
    """
    means = {cell: np.mean(values) for cell, values in cells.items()}
    size = np.mean([means[cell] for cell in cells if cell[factor] == "gelu"]) - np.mean(
        [means[cell] for cell in cells if cell[factor] == "relu"]
    )
    free = sum(len(values) - 1 for values in cells.values())
    if not free:
        return float(size), float("nan")
    within = sum(len(values) * float(np.var(values)) for values in cells.values())
    inverse = sum(1 / len(values) for values in cells.values())
    return float(size), float(np.sqrt(within / free * inverse) / 2)


def _larger_effect(quantity: str, paper: str, cells: Mapping[tuple[str, str], Values]) -> Check:
    criterion = (
        f"effect of the activation (GELU - ReLU) on {quantity}: channel mixing's is larger than "
        "token mixing's and than twice its standard error"
    )
    if not all(len(values) for values in cells.values()):
        return Check(criterion, paper, "–", "not run")
    (token, token_error), (channel, channel_error) = (effect(cells, i) for i in range(2))
    measured = (
        f"token {number(token)} ± {number(token_error, 2)}, "
        f"channel {number(channel)} ± {number(channel_error, 2)}"
    )
    larger = abs(channel) > max(abs(token), 2 * channel_error)
    return Check(criterion, paper, measured, decided(cells.values(), larger))


def _percents(values: Values) -> str:
    return spread(100 * np.asarray(values), 4)
