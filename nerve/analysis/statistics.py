"""Statistics over many groups at once, with intervals, in NumPy; missing values are NaN.

Each value has an integer code: values with the same code form a group, and a negative code belongs
to no group. The time depends on the number of values, hardly on the number of groups.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

LEVEL = 0.95
"""Confidence level of every interval."""

ROUNDING = 1e-12
"""A variation of at most this share of a value's size counts as none."""

MANY = 200
"""From this many degrees of freedom on, the quantile of Student's t is an expansion in their
inverse."""


@dataclass(frozen=True)
class Pairs:
    """Pairs (x, y) without missing values, ordered by group.

    Attributes:
        x, y: the values, group after group.
        n: number of pairs in each group.
    """

    x: Array
    y: Array
    n: Counts

    @classmethod
    def of(cls, codes: Counts, x: Array, y: Array, n_groups: int) -> "Pairs":
        """Sorts by code, and leaves out pairs that are not finite or belong to no group."""
        kept = np.isfinite(x) & np.isfinite(y) & (codes >= 0)
        codes, x, y = codes[kept], x[kept], y[kept]
        if (codes[1:] < codes[:-1]).any():
            order = np.argsort(codes, kind="stable")
            codes, x, y = codes[order], x[order], y[order]
        return cls(x, y, np.bincount(codes, minlength=n_groups))

    @cached_property
    def moments(self) -> tuple[Array, Array, Array]:
        """Σ dx², Σ dy² and Σ dx·dy per group, of the deviations from the group's means."""
        dx, dy = self.centered(self.x), self.centered(self.y)
        return self.sums(dx * dx), self.sums(dy * dy), self.sums(dx * dy)

    @property
    def starts(self) -> Counts:
        """The first index of each nonempty group."""
        return (np.cumsum(self.n) - self.n)[self.n > 0]

    def sums(self, values: Array) -> Array:
        result = np.zeros(len(self.n))
        result[self.n > 0] = np.add.reduceat(values, self.starts) if len(values) else 0.0
        return result

    def centered(self, values: Array) -> Array:
        """`values` minus their group's mean; exactly 0 if the group is constant."""
        some = self.n > 0
        shifted = values - np.repeat(values[self.starts], self.n[some])
        return shifted - np.repeat(self.sums(shifted)[some] / self.n[some], self.n[some])

    def rounding(self, values: Array) -> Array:
        """The largest Σ d² per group that rounding can produce from constant values."""
        return (ROUNDING**2) * self.sums(values * values)

    def ranked(self) -> "Pairs":
        """Pairs of ranks within each group; equal values have their mean rank."""
        return Pairs(self._ranks(self.x), self._ranks(self.y), self.n)

    def _ranks(self, values: Array) -> Array:
        order = self._order(values)
        ordered = values[order]
        new = np.ones(len(values), dtype=bool)
        new[1:] = ordered[1:] != ordered[:-1]
        new[self.starts] = True
        first = np.flatnonzero(new)
        last = np.append(first[1:], len(values)) - 1
        result = np.empty(len(values))
        result[order] = np.repeat((first + last) / 2, last - first + 1)
        return result - np.repeat(self.starts - 1.0, self.n[self.n > 0])

    def _order(self, values: Array) -> Counts:
        """The order within groups, sorting groups of equal size together, which is much faster than
        sorting by two keys."""
        order = np.empty(len(values), dtype=np.int64)
        sizes = self.n[self.n > 0]
        for size in np.unique(sizes):
            rows = self.starts[sizes == size][:, None] + np.arange(size)
            order[rows] = np.take_along_axis(rows, np.argsort(values[rows], axis=1), axis=1)
        return order


def correlation(pairs: Pairs) -> Array:
    """Pearson's r per group, in [-1, 1]; for `pairs.ranked()`, Spearman's.

    Missing for fewer than 3 pairs (two always lie on a line), and if x or y is constant up to
    rounding, like the steps of a linear schedule.
    """
    xx, yy, xy = pairs.moments
    valid = (pairs.n >= 3) & (xx > pairs.rounding(pairs.x)) & (yy > pairs.rounding(pairs.y))
    r = np.full(len(pairs.n), np.nan)
    r[valid] = xy[valid] / (np.sqrt(xx[valid]) * np.sqrt(yy[valid]))
    return np.clip(r, -1.0, 1.0)


@dataclass(frozen=True)
class Line:
    """y = intercept + slope · x of each group, by least squares.

    Attributes:
        slope, intercept: missing for fewer than 2 pairs or if x is constant.
        low, high: the interval of the slope, from Student's t with n - 2 degrees of freedom;
            missing for fewer than 3 pairs.
        r_squared: the share of the variance of y that the line explains; missing for fewer than 3
            pairs and if y is constant.
    """

    slope: Array
    intercept: Array
    low: Array
    high: Array
    r_squared: Array


def fit_line(pairs: Pairs) -> Line:
    """The least squares line of each group."""
    xx, yy, xy = pairs.moments
    n = pairs.n
    slope = _divide(xy, xx)
    intercept = _divide(pairs.sums(pairs.y) - slope * pairs.sums(pairs.x), n)
    residuals = pairs.centered(pairs.y) - np.repeat(slope, n) * pairs.centered(pairs.x)
    unexplained = pairs.sums(residuals * residuals)
    free = np.maximum(n - 2, 0)
    half = student_t(free) * np.sqrt(_divide(_divide(unexplained, free), xx))
    r_squared = np.where(free > 0, 1.0 - _divide(unexplained, yy), np.nan)
    return Line(slope, intercept, slope - half, slope + half, r_squared)


def pearson_interval(r: Array, n: Counts) -> tuple[Array, Array]:
    """Fisher's z interval, tanh(atanh r ± z/√(n - 3)).

    Missing for n < 4, and at r = ±1, where z is infinite.
    """
    return _fisher(r, np.ones_like(r), n)


def spearman_interval(r: Array, n: Counts) -> tuple[Array, Array]:
    """Like `pearson_interval`, with the variance (1 + r²/2)/(n - 3) (Bonett & Wright 2000)."""
    return _fisher(r, 1.0 + r * r / 2.0, n)


def student_t(free: Counts) -> Array:
    """The two-sided quantile of Student's t at `LEVEL` for integer degrees of freedom; NaN below 1.

    From `MANY` degrees of freedom on, the expansion in 1/ν about the normal quantile (Abramowitz &
    Stegun 26.7.5), whose relative error is then below 2e-12. For fewer, the distribution function,
    a finite series in θ = atan(t/√ν) (26.7.3 and 26.7.4) that increases with θ; bisection finds
    where it equals `LEVEL`.
    """
    free = np.asarray(free)
    quantiles = np.full(free.shape, np.nan)
    few, many = (free >= 1) & (free < MANY), free >= MANY
    values, inverse = np.unique(free[few], return_inverse=True)
    quantiles[few] = np.array([_student_t(int(value)) for value in values])[inverse]
    if many.any():
        quantiles[many] = _expansion(free[many].astype(float))
    return quantiles


def _expansion(free: Array) -> Array:
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    terms = (
        np.polyval([1, 0, 1, 0], z) / 4,
        np.polyval([5, 0, 16, 0, 3, 0], z) / 96,
        np.polyval([3, 0, 19, 0, 17, 0, -15, 0], z) / 384,
        np.polyval([79, 0, 776, 0, 1482, 0, -1920, 0, -945, 0], z) / 92_160,
    )
    return np.asarray(z + sum(term / free**k for k, term in enumerate(terms, 1)))


@lru_cache(maxsize=MANY)
def _student_t(free: int) -> float:
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        if _within(middle, free) < LEVEL:
            low = middle
        else:
            high = middle
    return math.sqrt(free) * math.tan(low)


def _within(theta: float, free: int) -> float:
    """The probability of |t| < √ν tan θ."""
    cosine = math.cos(theta)
    odd = free % 2
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(odd, free - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    total *= math.sin(theta)
    return 2.0 / math.pi * (theta + total) if odd else total


def _fisher(r: Array, variance: Array, n: Counts) -> tuple[Array, Array]:
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    half = z * np.sqrt(_divide(variance, np.where(n > 3, n - 3, 0)))
    perfect = 1.0 - np.abs(r) < 1e-12  # up to rounding
    center = np.arctanh(np.where(perfect, np.nan, r))
    return np.tanh(center - half), np.tanh(center + half)


def _divide(a: Array, b: Array | Counts) -> Array:
    """a / b, missing if b is 0."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)
