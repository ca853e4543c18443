"""Core checks of claims 11 to 15: optimizers, the MLP-Mixer, and the cost of measuring."""

from itertools import product

import numpy as np
from claims.mixer import best_rates
from evidence import Sweep

from criteria import values as v
from criteria.benchmark import Benchmark, small_and_seen
from criteria.check import CoreCheck, Scale
from criteria.designs import NORMS, largest
from criteria.effects import (
    Effect,
    Value,
    descending,
    difference,
    least,
    mean,
    ranks_the_designs,
)
from criteria.gpt import log_pr_post, pr_gain
from criteria.measured import Design, Measured

OPTIMIZERS: dict[str, Design] = {
    name: {"optimizer.name": name} for name in ("adamw", "muon", "dion")
}
RATES: dict[str, Design] = {
    f"{name} {rate:g}": {"optimizer.name": name, "optimizer.lr": rate}
    for name in ("adamw", "muon", "dion", "sgd", "adafactor")
    for rate in (
        *(1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 6e-3, 5e-3),
        *(0.01, 0.02, 0.03, 0.04, 0.1, 0.3, 1.0),
    )
}
CELLS: dict[str, Design] = {
    f"{token}/{channel}": {
        "model.token_mixing.activation": token,
        "model.channel_mixing.activation": channel,
    }
    for token, channel in product(("gelu", "relu"), repeat=2)
}
MIXER_OPTIMIZERS: dict[str, Design] = {name: {"optimizer.name": name} for name in ("sgd", "adamw")}
MIXER = Scale(4, 64, 600, 0)
CEILING = 0.95
NO_CEILING = (
    f"a task below its ceiling (accuracy < {CEILING})",
    lambda runs: bool(np.nanmax(runs.accuracy) < CEILING),
)


def best_of_each(sweep: Sweep) -> Sweep:
    """The runs of each optimizer at its rate with the lowest loss at seed 0."""
    points = sweep.ok[sweep.ok["seed"] == 0].merge(sweep.runs[["run_id", "optimizer.name"]])
    lowest = points.sort_values("val_loss").drop_duplicates("optimizer.name")
    best = dict(zip(lowest["optimizer.name"], lowest["optimizer.lr"], strict=True))
    return sweep.where(sweep.runs["optimizer.lr"] == sweep.runs["optimizer.name"].map(best))


def best_of_mixers(sweep: Sweep) -> Sweep:
    """The runs of each optimizer at its rate with the highest mean accuracy."""
    sweep = sweep.by("optimizer.name")
    rates = best_rates(sweep.ok[sweep.ok["ffn"] == "token_mixing"])
    return sweep.where(sweep.runs["optimizer.lr"] == sweep.runs["level"].map(rates))


def largest_gain(runs: Measured) -> np.ndarray:
    """The log of the largest PR gain over layers, shape (run, step)."""
    return v.log_gain(runs).max(axis=2)


def first_pr_pre(runs: Measured) -> np.ndarray:
    """log of the mean PR_pre of the first half of the layers, shape (run, step)."""
    return v.mean_of(runs, "pr_pre", 0, 1 / 2, log=True)


def at_both(series: Value, *names: str) -> Effect:
    """The order of designs at the end of training and at equal loss, whichever is less clear."""
    return least(
        descending(lambda runs: v.final(series(runs)), *names),
        descending(lambda runs: v.at_equal_loss(series(runs), runs, names), *names),
    )


def middle_pr_post(runs: Measured) -> np.ndarray:
    return v.final(v.mean_of(runs, "pr_post", 1 / 3, 2 / 3, log=True))


OPTIMIZER = {
    "designs": OPTIMIZERS,
    "sources": ("paper_optimizer_gpu", "optimizer_gpu"),
    "labels": "design",
    "seeds": 3,
    "scale": Scale(24, 1024, 3_000, 190e6),
    "smallest": 0.1,
    "narrow": best_of_each,
}
MIXER_ACTIVATION = {
    "designs": CELLS,
    "sources": ("glyphs_activation", "mixer_activation"),
    "seeds": 10,
    "scale": MIXER,
}
MIXER_OPTIMIZER = {
    "designs": MIXER_OPTIMIZERS,
    "compared": ("sgd", "adamw"),
    "sources": ("glyphs_optimizer", "mixer_optimizer"),
    "labels": "design",
    "seeds": 10,
    "scale": MIXER,
    "narrow": best_of_mixers,
}

CHECKS = (
    CoreCheck(
        "11.gain",
        "at the end and at equal loss AdamW's largest PR gain is above Dion's, and Dion's above "
        "Muon's",
        "log of the largest PR gain, the smallest of four differences between neighbors; nats",
        at_both(largest_gain, "adamw", "dion", "muon"),
        compared=("adamw", "dion", "muon"),
        paper="1.37 and 0.99, at the end",
        paper_value=0.99,
        why="at the end they also differ in loss; at equal loss alone, a clock would order them",
        **OPTIMIZER,
    ),
    CoreCheck(
        "11.pre",
        "at the end and at equal loss Muon's PR_pre in the first half of the layers is above "
        "AdamW's",
        "log of mean PR_pre, Muon minus AdamW, the smaller of the two; nats",
        at_both(first_pr_pre, "muon", "adamw"),
        compared=("muon", "adamw"),
        paper="about 2.9, at the end",
        paper_value=2.9,
        **OPTIMIZER,
    ),
    CoreCheck(
        "12.middle",
        "PR_post of the middle layers ranks optimizers and rates as the loss does",
        "-Spearman's r of PR_post (middle third) and loss over designs",
        ranks_the_designs(middle_pr_post),
        RATES,
        (),
        ("optimizer_rates_gpu", "optimizer_gpu"),
        "spectrum",
        seeds=9,
        unit="designs",
        scale=Scale(12, 512, 3_000, 98e6),
        paper="1.00 for three optimizers",
        why="an order of three occurs by chance once in six, so nine designs are required",
    ),
    CoreCheck(
        "13.pattern",
        "training raises the PR gain of a Mixer's nonlinearities",
        "log PR_post/PR_pre, means over all FFNs, mean of the four cells, end minus step 0; nats",
        mean(pr_gain, *CELLS),
        compared=tuple(CELLS),
        labels="step",
        paper="not known",
        smallest=0.1,
        why="as in claim 1",
        **MIXER_ACTIVATION,
    ),
    CoreCheck(
        "13.channel",
        "GELU does more for the accuracy in channel mixing than in token mixing",
        "accuracy, ReLU/GELU minus GELU/ReLU (token/channel); points",
        difference(lambda runs: 100 * runs.accuracy, "relu/gelu", "gelu/relu"),
        compared=("relu/gelu", "gelu/relu"),
        labels="design",
        paper="0.87",
        paper_value=0.87,
        needs=NO_CEILING,
        why="the difference between the effects of the two factors, with its sign",
        **MIXER_ACTIVATION,
    ),
    CoreCheck(
        "14.accuracy",
        "SGD reaches a better accuracy than AdamW on an MLP-Mixer, each at its best rate",
        "accuracy, SGD minus AdamW; points",
        difference(lambda runs: 100 * runs.accuracy, "sgd", "adamw"),
        paper="1.11",
        paper_value=1.11,
        needs=NO_CEILING,
        **MIXER_OPTIMIZER,
    ),
    CoreCheck(
        "14.pr",
        "and keeps more dimensions after the nonlinearity",
        "log of mean PR_post of all FFNs, SGD minus AdamW; nats",
        difference(log_pr_post, "sgd", "adamw"),
        paper="higher",
        **MIXER_OPTIMIZER,
    ),
    CoreCheck(
        "15.runs",
        "measuring at every 1000 steps would take at most 1% of the training time",
        "1 minus the share in percent, of stored runs alone on their GPU; points; or log of the "
        "number of steps that take as long as a measurement; the smaller",
        least(
            mean(lambda runs: 1 - 100 * v.share_at_1000(runs), "PreLN GELU"),
            mean(v.log_steps, "PreLN GELU"),
        ),
        NORMS,
        ("PreLN GELU",),
        ("paper_normfree_gpu", "activation_gpu"),
        "measured",
        seeds=2,
        scale=Scale(12, 768, 3_000, 98e6),
        narrow=largest,
        paper="about 0",
        why="runs that share a GPU measure a higher cost, so those of this check were alone; a "
        "cost that these times cannot show would be small under any labels, so it must be visible",
    ),
    Benchmark(
        "15.stall",
        "the stall of a measurement at every 1000 steps is at most 1% of the training time",
        "1 minus the share in percent, of each measurement of a stored benchmark; points; or the "
        "stall minus that of steps far from a measurement, in steps; the smaller",
        small_and_seen,
        {},
        (),
        ("benchmarks/monitor.json",),
        "measured",
        seeds=4,
        unit="measurements",
        scale=Scale(12, 768, 60, 0),
        paper="about 0",
    ),
)
