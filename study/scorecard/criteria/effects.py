"""The effects that checks estimate, computed from one value per run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.stats import rankdata

from criteria import values as v
from criteria.measured import Measured
from nerve.analysis.estimate import Estimate, contrast, correlation_estimate, slope_difference

Value = Callable[[Measured], np.ndarray]
"""One number per run, shape (run,), or one per run and step."""
Effect = Callable[[Measured], Estimate]


def mean(value: Value, *names: str) -> Effect:
    """The mean over designs."""
    weights = dict.fromkeys(names, 1 / len(names))
    return lambda runs: contrast(value(runs), runs.design, runs.seed, weights)


def difference(value: Value, more: str, less: str) -> Effect:
    """One design minus another, paired by seed."""
    weights = {more: 1.0, less: -1.0}
    return lambda runs: contrast(value(runs), runs.design, runs.seed, weights)


def descending(value: Value, *names: str) -> Effect:
    """The smallest difference between neighbors, each design minus the next."""
    return least(*(difference(value, *pair) for pair in pairwise(names)))


def least(*effects: Effect) -> Effect:
    """The lowest of several effects, according to `lowest`."""
    return lambda runs: lowest([effect(runs) for effect in effects])


def lowest(found: Sequence[Estimate]) -> Estimate:
    """The effect whose interval has the lowest bound, which lies above a limit if and only if all
    do; if some have no interval, the smallest of these. Its number of seeds is the smallest of
    all."""

    def rank(each: Estimate) -> tuple[float, float]:
        effect = -np.inf if np.isnan(each.effect) else each.effect
        return each.low if each.has_interval else -np.inf, effect

    least = min(found, key=rank)
    return replace(least, n_seeds=min(each.n_seeds for each in found))


def steeper(value: Value, more: str, less: str) -> Effect:
    """The slope over log width of one design minus that of another; names are `design width`."""

    def estimate(runs: Measured) -> Estimate:
        design = np.array([name.rpartition(" ")[0] for name in runs.design.tolist()])
        return slope_difference(value(runs), design, np.log(runs.width), {more: 1.0, less: -1.0})

    return estimate


def beyond_the_start(series: Value) -> Effect:
    """-r of the final value of a series and the final loss over runs, given its value at step 0."""

    def estimate(runs: Measured) -> Estimate:
        own = series(runs)
        return correlation_estimate(v.final(own), -v.final(runs.loss), [own[:, 0]])

    return estimate


def ranks_the_designs(value: Value) -> Effect:
    """-Spearman's r of a value and the final loss over the means of designs.

    The seeds of a design are one point.
    """

    def estimate(runs: Measured) -> Estimate:
        means = [v.design_means(runs, each) for each in (value(runs), -v.final(runs.loss))]
        return correlation_estimate(rankdata(means[0]), rankdata(means[1]))

    return estimate
