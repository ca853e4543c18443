"""Fits values = design + seed + error by ordinary least squares, for many runs and effects."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nerve.analysis.statistics import student_t


@dataclass(frozen=True)
class Effects:
    """Several effects; all attributes have shape (effect,).

    Attributes:
        effect: the estimates; nan if the data do not determine one.
        low, high: their 95% intervals; nan without degrees of freedom for the error.
        sd: residual SD of one value of one run, given design and seed.
        df: degrees of freedom.
    """

    effect: np.ndarray
    low: np.ndarray
    high: np.ndarray
    sd: np.ndarray
    df: np.ndarray


@dataclass(frozen=True)
class PairedFit:
    """Ordinary least squares of values = design + seed + error, for any values and effects.

    The designs are eliminated from the normal equations first, so that for ten thousand runs of a
    thousand designs only a matrix of the size of the number of seeds remains.

    Attributes:
        designs: the names of the designs, in order.
        design, seed: the index of each run's design, and that of its seed minus one, shape (run,);
            -1 for the first seed, and for all seeds if they are part of the error.
        n_seeds: number of columns for seeds.
    """

    designs: list[str]
    design: np.ndarray
    seed: np.ndarray
    n_seeds: int

    @cached_property
    def n(self) -> np.ndarray:
        """The number of runs of each design, shape (design,)."""
        return np.bincount(self.design, minlength=len(self.designs)).astype(float)

    @cached_property
    def shares(self) -> np.ndarray:
        """The share of a design's runs that have each seed, shape (design, seed)."""
        counts = np.zeros((len(self.designs), self.n_seeds))
        has = self.seed >= 0
        np.add.at(counts, (self.design[has], self.seed[has]), 1.0)
        return counts / self.n[:, None]

    @cached_property
    def _schur_complement(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The Schur complement (the matrix of the seeds' normal equations after eliminating the
        designs), its pseudoinverse, and its rank."""
        counts = self.shares * self.n[:, None]
        complement = np.diag(counts.sum(axis=0)) - counts.T @ self.shares
        values, vectors = np.linalg.eigh(complement)
        found = values > 1e-10 * max(1.0, values.max(initial=0.0))
        inverse = (vectors[:, found] / values[found]) @ vectors[:, found].T
        return complement, inverse, int(found.sum())

    @cached_property
    def df(self) -> int:
        """Degrees of freedom of the error."""
        return len(self.design) - len(self.designs) - self._schur_complement[2]

    def differences(self, values: np.ndarray, one: np.ndarray, two: np.ndarray) -> Effects:
        """For each pair, the effect of the design `two` minus that of the design `one`.

        Args:
            values: shape (run,).
            one, two: indices of designs, shape (pair,).
        """
        of_designs, seeds = self._solution(values)
        return self._effects(
            values,
            self._residual(values, of_designs, seeds),
            of_designs[two] - of_designs[one],
            1 / self.n[two] + 1 / self.n[one],
            self.shares[one] - self.shares[two],
        )

    def weighted(self, values: np.ndarray, weights: Mapping[str, float]) -> Effects:
        """A weighted sum of the effects of designs, with weights by name; shape (1,)."""
        of_designs, seeds = self._solution(values)
        row = np.array([weights.get(name, 0.0) for name in self.designs])
        through = -(row @ self.shares)
        return self._effects(
            values,
            self._residual(values, of_designs, seeds),
            (row @ of_designs)[None],
            (row**2 / self.n).sum()[None],
            through[None],
        )

    def _solution(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The effect of each design, and of each seed except the first."""
        sums = np.bincount(self.design, values, minlength=len(self.designs))
        has = self.seed >= 0
        of_seeds = np.bincount(self.seed[has], values[has], minlength=self.n_seeds)
        _, inverse, _ = self._schur_complement
        seeds = inverse @ (of_seeds - sums @ self.shares)
        return sums / self.n - self.shares @ seeds, seeds

    def _residual(
        self, values: np.ndarray, of_designs: np.ndarray, seeds: np.ndarray
    ) -> np.ndarray:
        """What the solution does not explain, shape (run,)."""
        of_seeds = np.append(seeds, 0.0)  # the last entry, 0, is that of seed -1
        return values - of_designs[self.design] - of_seeds[self.seed]

    def _effects(
        self,
        values: np.ndarray,
        residual: np.ndarray,
        effect: np.ndarray,
        own: np.ndarray,
        through: np.ndarray,
    ) -> Effects:
        """The effects with their t intervals. An effect is nan if the data do not determine it;
        without degrees of freedom it has no interval. A residual that is only rounding counts as
        zero, so constants have an interval of zero width.

        Args:
            values, residual: shape (run,).
            effect: shape (effect,).
            own: its variance apart from the part due to seeds, for errors of variance 1.
            through: its coefficients of the seed effects, shape (effect, seed).
        """
        complement, inverse, _ = self._schur_complement
        known = (np.abs(through @ inverse @ complement - through) <= 1e-8).all(axis=1)
        effect = np.where(known, np.where(np.abs(effect) < 1e-12, 0.0, effect), np.nan)
        df = np.where(known, max(self.df, 0), 0)
        if self.df < 1:
            missing = np.full(len(effect), np.nan)
            return Effects(effect, missing, missing, missing, df)
        square = sum_of_squares(residual, values)
        sd = np.where(known, np.sqrt(square / self.df), np.nan)
        error = sd * np.sqrt(own + ((through @ inverse) * through).sum(axis=1))
        half = float(student_t(np.array([self.df]))[0]) * error
        return Effects(effect, effect - half, effect + half, sd, df)


def paired_by_seed(design: np.ndarray, seed: np.ndarray, *, seeds_differ: bool = True) -> PairedFit:
    """Prepares the fit of values = design + seed + error.

    Args:
        design, seed: shape (run,).
        seeds_differ: if False, seeds are part of the error.
    """
    names, own = np.unique(design, return_inverse=True)
    seeds, numbers = np.unique(seed, return_inverse=True)
    if not seeds_differ:
        return PairedFit(names.tolist(), own, np.full(len(own), -1), 0)
    return PairedFit(names.tolist(), own, numbers - 1, len(seeds) - 1)


def sum_of_squares(residual: np.ndarray, values: np.ndarray) -> float:
    """The sum of squares of the residual of `values`; 0 if it is only rounding."""
    square = float(residual @ residual)
    return 0.0 if square <= (1e-12 * max(1.0, float(np.abs(values).max()))) ** 2 else square
