"""Effects with 95% intervals, and the outcomes and verdicts that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import numpy as np

from nerve.analysis.paired_fit import Effects, paired_by_seed, sum_of_squares
from nerve.analysis.partial import partial_correlation
from nerve.analysis.statistics import LEVEL, student_t

Reading = Literal["holds", "opposite", "within noise"]
Outcome = Literal["holds", "opposite", "within noise", "undecided"]
Verdict = Literal["holds", "does not hold", "cannot be told here"]

LEAST_DF = 3
"""The fewest degrees of freedom with which an interval decides anything."""


@dataclass(frozen=True)
class Estimate:
    """An effect, positive in the direction of a claim.

    Attributes:
        effect: the estimate; nan if it cannot be computed.
        low, high: its 95% interval; nan without degrees of freedom for the error.
        sd: residual SD of one value of one run, given design and seed; nan for correlations.
        df: degrees of freedom of the interval; for a correlation, n - 3 - number of controls.
        n_seeds: number of seeds that all compared designs share; for a correlation, its points; for
            slopes, the points of the design with the fewest.
        n_runs: number of runs from which the effect is computed.
    """

    effect: float
    low: float
    high: float
    sd: float
    df: int
    n_seeds: int
    n_runs: int

    @classmethod
    def of(cls, effects: Effects, i: int, n_seeds: int, n_runs: int) -> "Estimate":
        """The i-th of several effects."""
        numbers = (effects.effect, effects.low, effects.high, effects.sd)
        effect, low, high, sd = (float(each[i]) for each in numbers)
        return cls(effect, low, high, sd, int(effects.df[i]), n_seeds, n_runs)

    @property
    def has_interval(self) -> bool:
        return bool(np.isfinite([self.low, self.high]).all())


def read(estimate: Estimate, smallest: float) -> Reading | None:
    """What an interval says, regardless of seeds and scale; None without an interval.

    `holds` if it lies above `smallest`, `opposite` if it lies below 0, otherwise `within noise`.
    """
    if not estimate.has_interval:
        return None
    if estimate.low > smallest:
        return "holds"
    return "opposite" if estimate.high < 0 else "within noise"


def decide(estimate: Estimate, smallest: float = 0.0, missing: Sequence[str] = ()) -> Outcome:
    """The outcome of an estimate: what its interval says (`read`), or `undecided`.

    It is `undecided` if anything required is `missing` (seeds, scale), without an interval, and
    with fewer than `LEAST_DF` degrees of freedom.
    """
    reading = read(estimate, smallest)
    if missing or reading is None or estimate.df < LEAST_DF:
        return "undecided"
    return reading


def verdict(outcomes: Sequence[tuple[Outcome, bool]]) -> Verdict:
    """The verdict on a claim, from the outcome of each of its checks and whether a null model
    passes the check as well.

    `holds` if all hold and no null model passes; `does not hold` if one is opposite or within
    noise; otherwise `cannot be told here`.
    """
    if any(outcome in ("opposite", "within noise") for outcome, _ in outcomes):
        return "does not hold"
    if outcomes and all(outcome == "holds" and not passes for outcome, passes in outcomes):
        return "holds"
    return "cannot be told here"


@dataclass(frozen=True)
class LeastSquares:
    """Ordinary least squares with one design matrix, for any values and effects.

    Attributes:
        matrix: the design matrix, shape (run, column).
    """

    matrix: np.ndarray

    @cached_property
    def inverse(self) -> np.ndarray:
        return np.linalg.pinv(self.matrix)

    @cached_property
    def df(self) -> int:
        """Degrees of freedom of the error."""
        return len(self.matrix) - int(np.linalg.matrix_rank(self.matrix))

    def effect(
        self, values: np.ndarray, weights: np.ndarray
    ) -> tuple[float, float, float, float, int]:
        """Effect `weights · β`, its t interval, residual SD and df.

        All are nan if the data do not determine the effect. Without degrees of freedom the effect
        has no interval. A residual that is only rounding counts as zero, so constants have an
        interval of zero width.

        Args:
            values: shape (run,).
            weights: shape (column,).
        """
        if not np.allclose(weights @ self.inverse @ self.matrix, weights, atol=1e-8):
            return (np.nan, np.nan, np.nan, np.nan, 0)
        effect = float(weights @ self.inverse @ values)
        if self.df < 1:
            return effect, np.nan, np.nan, np.nan, 0
        residual = values - self.matrix @ (self.inverse @ values)
        square = sum_of_squares(residual, values)
        sd = np.sqrt(square / self.df)
        error = sd * float(np.linalg.norm(weights @ self.inverse))
        half = float(student_t(np.array([self.df]))[0]) * error
        if abs(effect) < 1e-12:
            effect = 0.0
        return effect, effect - half, effect + half, float(sd), self.df


def contrast(
    values: np.ndarray, design: np.ndarray, seed: np.ndarray, weights: Mapping[str, float]
) -> Estimate:
    """A weighted sum of the designs' means, with runs paired by seed.

    The model is values = design + seed + error, fitted by ordinary least squares over all given
    designs. Their errors are pooled, including those of designs with weight 0. With two designs and
    weights 1 and -1 this gives the paired t interval. If the weights do not sum to 0 (as for the
    mean of a design), seeds are part of the error.

    Args:
        values: shape (run,); runs without a finite value are left out.
        design, seed: shape (run,).
        weights: the weight of each design, by its name.
    """
    kept = np.isfinite(values)
    values, design, seed = values[kept], design[kept], seed[kept]
    seeds = [set(seed[design == name].tolist()) for name in weights]
    shared = set.intersection(*seeds)
    n_runs = int(np.isin(design, list(weights)).sum())
    if not all(seeds):
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, len(shared), n_runs)
    is_difference = abs(sum(weights.values())) < 1e-12
    fit = paired_by_seed(design, seed, seeds_differ=is_difference)
    return Estimate.of(fit.weighted(values, weights), 0, len(shared), n_runs)


def slope_difference(
    values: np.ndarray, design: np.ndarray, x: np.ndarray, weights: Mapping[str, float]
) -> Estimate:
    """A weighted sum of the designs' slopes over x, where each design has its own intercept."""
    kept = np.isfinite(values) & np.isfinite(x) & np.isin(design, list(weights))
    values, design, x = values[kept], design[kept], x[kept]
    own = [design == name for name in weights]
    if not all(part.any() for part in own):
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, 0, len(values))
    columns = [part.astype(float) for part in own] + [part * x for part in own]
    row = np.array([0.0] * len(own) + list(weights.values()))
    n_points = min(len(set(x[part].tolist())) for part in own)
    fit = LeastSquares(np.stack(columns, axis=1))
    return Estimate(*fit.effect(values, row), n_points, len(values))


def correlation_estimate(
    x: np.ndarray, y: np.ndarray, given: Sequence[np.ndarray] = ()
) -> Estimate:
    """Partial correlation over n points with Fisher's interval, tanh(atanh r ± z / √(n-3-k)).

    k is the number of controls; fewer than 4 + k points have no interval.

    Args:
        x, y: shape (n,); a point is left out if any of its values is not finite.
        given: the controls, each of shape (n,).
    """
    kept = np.isfinite([x, y, *given]).all(axis=0)
    n = int(kept.sum())
    df = n - 3 - len(given)
    if df < 1:
        return Estimate(np.nan, np.nan, np.nan, np.nan, 0, n, n)
    r = float(partial_correlation(x[kept], y[kept], [control[kept] for control in given]))
    half = NormalDist().inv_cdf((1 + LEVEL) / 2) / np.sqrt(df)
    middle = np.arctanh(np.clip(r, -1 + 1e-9, 1 - 1e-9))
    low, high = np.tanh(middle - half), np.tanh(middle + half)
    return Estimate(r, float(low), float(high), np.nan, df, n, n)
