"""Design + seed + error against the pseudoinverse of the full matrix."""

import numpy as np
import pytest

from nerve.analysis.estimate import LeastSquares
from nerve.analysis.paired_fit import paired_by_seed


def layout(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, designs and seeds of some runs, with missing and repeated seeds, or with a single
    design."""
    rng = np.random.default_rng(number)
    n = int(rng.integers(3, 30))
    design = rng.integers(0, rng.integers(2, 7), n).astype(str)
    seed = rng.integers(0, rng.integers(1, 7), n)
    return rng.normal(size=n) + 3.0 * seed, design, seed


def dense(design: np.ndarray, seed: np.ndarray) -> LeastSquares:
    columns = [design == name for name in np.unique(design)]
    columns += [seed == number for number in np.unique(seed)[1:]]
    return LeastSquares(np.stack(columns, axis=1).astype(float))


@pytest.mark.parametrize("number", range(40))
def test_differences_are_those_of_the_pseudoinverse(number):
    """Effects, intervals, SD and degrees of freedom of all pairs; undetermined ones are nan."""
    values, design, seed = layout(number)
    names = np.unique(design)
    one, two = np.triu_indices(len(names), 1)
    fit, whole = paired_by_seed(design, seed), dense(design, seed)
    found = fit.differences(values, one, two)
    assert fit.df == whole.df
    for i, (first, second) in enumerate(zip(one, two, strict=True)):
        weights = np.zeros(whole.matrix.shape[1])
        weights[[first, second]] = -1, 1
        *expected, df = whole.effect(values, weights)
        own = [each[i] for each in (found.effect, found.low, found.high, found.sd)]
        assert own == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert found.df[i] == df


@pytest.mark.parametrize("number", range(10))
def test_a_weighted_sum_is_that_of_the_pseudoinverse(number):
    """With seeds as part of the error."""
    values, design, seed = layout(number)
    names = np.unique(design)
    weights = np.arange(1.0, len(names) + 1)
    columns = np.stack([design == name for name in names], axis=1).astype(float)
    fit = paired_by_seed(design, seed, seeds_differ=False)
    found = fit.weighted(values, dict(zip(names, weights, strict=True)))
    *expected, df = LeastSquares(columns).effect(values, weights)
    assert [found.effect[0], found.low[0], found.high[0], found.sd[0]] == pytest.approx(
        expected, nan_ok=True
    )
    assert found.df[0] == df
