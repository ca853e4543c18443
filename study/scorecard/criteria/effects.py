"""Effects of runs: of a value per run, what a check estimates."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from scipy.stats import rankdata

from criteria import values as v
from criteria.measured import Measured
from nerve.analysis.estimate import Estimate, contrast, correlation, slope_difference

Value = Callable[[Measured], np.ndarray]
"""A number a run, shape (run,), or a number a run and step."""
Effect = Callable[[Measured], Estimate]


def mean(value: Value, *names: str) -> Effect:
    """The mean over designs."""
    weights = dict.fromkeys(names, 1 / len(names))
    return lambda runs: contrast(value(runs), runs.design, runs.seed, weights)


def difference(value: Value, more: str, less: str) -> Effect:
    """One design less another, paired by seed."""
    weights = {more: 1.0, less: -1.0}
    return lambda runs: contrast(value(runs), runs.design, runs.seed, weights)


def descending(value: Value, *names: str) -> Effect:
    """The least of the differences of neighbors, each design less the next."""
    return least(*(difference(value, *pair) for pair in pairwise(names)))


def least(*effects: Effect) -> Effect:
    """The lowest of several effects, as `lowest` has it."""
    return lambda runs: lowest([effect(runs) for effect in effects])


def lowest(found: Sequence[Estimate]) -> Estimate:
    """The effect whose interval has the lowest bound: it lies above a limit just where all do. It
    has the seeds that all of them have."""
    least = min(found, key=lambda each: each.low if each.has_interval else -np.inf)
    return replace(least, n_seeds=min(each.n_seeds for each in found))


def steeper(value: Value, more: str, less: str) -> Effect:
    """The slope over log width of one design less that of another; names are `design width`."""

    def estimate(runs: Measured) -> Estimate:
        design = np.array([name.rpartition(" ")[0] for name in runs.design.tolist()])
        return slope_difference(value(runs), design, np.log(runs.width), {more: 1.0, less: -1.0})

    return estimate


def beyond_the_start(series: Value) -> Effect:
    """-r of a series' end and the final loss over runs, given its value at step 0."""

    def estimate(runs: Measured) -> Estimate:
        own = series(runs)
        return correlation(v.final(own), -v.final(runs.loss), [own[:, 0]])

    return estimate


def ranks_the_designs(value: Value) -> Effect:
    """-Spearman's r of a value and the final loss over the means of designs.

    Seeds of one design are no further points.
    """

    def estimate(runs: Measured) -> Estimate:
        means = [v.design_means(runs, each) for each in (value(runs), -v.final(runs.loss))]
        return correlation(rankdata(means[0]), rankdata(means[1]))

    return estimate
