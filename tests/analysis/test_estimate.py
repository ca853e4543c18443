"""Estimates and their intervals against SciPy and textbook formulas, and the outcomes that
follow."""

import math

import numpy as np
import pytest
from scipy import stats

from nerve.analysis.estimate import Estimate, contrast, correlation_estimate, decide, read, verdict


def test_two_designs_give_the_paired_t_interval_of_scipy():
    a, b = np.array([5.0, 7.0, 6.5, 9.0]), np.array([4.0, 6.8, 5.0, 8.5])
    seed = np.array([0, 1, 2, 3, 3, 2, 1, 0])
    values = np.concatenate([a, b[::-1]])
    found = contrast(values, np.repeat(["a", "b"], 4), seed, {"a": 1, "b": -1})
    expected = stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.effect == pytest.approx(np.mean(a - b))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.df, found.n_seeds, found.n_runs) == (3, 4, 8)


def test_the_mean_of_one_design_has_the_error_of_its_seeds():
    values = np.array([1.0, 2.0, 4.0])
    found = contrast(values, np.repeat("a", 3), np.arange(3), {"a": 1})
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.sd == pytest.approx(np.std(values, ddof=1))


def test_errors_are_pooled_over_all_designs_of_the_comparison():
    """Three designs, two seeds: the residuals of the two-way table have (3-1)(2-1) = 2 df."""
    table = np.array([[1.0, 2.5], [3.0, 4.0], [7.0, 7.5]])
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    sd = math.sqrt((residual**2).sum() / 2)
    half = stats.t.ppf(0.975, 2) * sd * math.sqrt(2 / 2)
    found = contrast(
        table.ravel(), np.repeat(["a", "b", "c"], 2), np.tile([0, 1], 3), {"c": 1, "a": -1}
    )
    effect = table[2].mean() - table[0].mean()
    assert (found.effect, found.sd, found.df) == pytest.approx((effect, sd, 2))
    assert (found.low, found.high) == pytest.approx((effect - half, effect + half))


def test_pairing_by_seed_removes_a_large_spread_between_seeds():
    seeds = np.array([0.0, 100.0, -50.0, 30.0])
    values = np.concatenate([seeds + np.array([1.0, 1.1, 0.9, 1.0]), seeds])
    design = np.repeat(["a", "b"], 4)
    paired = contrast(values, design, np.tile(range(4), 2), {"a": 1, "b": -1})
    assert paired.low > 0.8
    unlike = contrast(values, design, np.arange(8), {"a": 1, "b": -1})
    assert not unlike.has_interval  # no seed in both: seed and design cannot be told apart


def test_a_correlation_has_fishers_interval():
    x, y, z = np.random.default_rng(0).normal(size=(3, 20))
    low, high = stats.pearsonr(x, y).confidence_interval(0.95)
    found = correlation_estimate(x, y)
    assert (found.low, found.high, found.df) == pytest.approx((low, high, 17))
    assert correlation_estimate(x, y, [z]).df == 16
    gap = np.where(np.arange(len(x)) == 3, np.nan, z)
    assert correlation_estimate(x, y, [gap]) == correlation_estimate(
        *np.delete([x, y], 3, 1), [np.delete(z, 3)]
    )
    assert not correlation_estimate(x[:3], y[:3]).has_interval


@pytest.mark.parametrize(
    ("low", "high", "smallest", "expected"),
    [
        (0.1, 0.3, 0.0, "holds"),
        (0.1, 0.3, 0.1, "within noise"),
        (-0.1, 0.3, 0.0, "within noise"),
        (0.0, 0.0, 0.0, "within noise"),
        (-0.3, -0.1, 0.0, "opposite"),
        (-0.3, -0.1, 0.1, "opposite"),
        (math.nan, math.nan, 0.0, None),
    ],
)
def test_the_reading_of_an_interval(low, high, smallest, expected):
    estimate = Estimate((low + high) / 2, low, high, 1.0, 5, 3, 6)
    assert read(estimate, smallest) == expected


@pytest.mark.parametrize(
    ("low", "df", "missing", "expected"),
    [
        (0.2, 3, [], "holds"),
        (0.2, 2, [], "undecided"),
        (0.2, 3, ["seeds (2 of 3)"], "undecided"),
        (-0.2, 9, [], "within noise"),
        (math.nan, 9, [], "undecided"),
    ],
)
def test_few_degrees_of_freedom_or_missing_requirements_decide_nothing(low, df, missing, expected):
    """Two degrees of freedom are too few, whatever the interval says."""
    assert decide(Estimate(0.3, low, 0.4, 0.1, df, 3, 6), 0.1, missing) == expected


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([("holds", False), ("holds", False)], "holds"),
        ([("holds", False), ("holds", True)], "cannot be told here"),
        ([("holds", False), ("undecided", False)], "cannot be told here"),
        ([("holds", False), ("within noise", False)], "does not hold"),
        ([("opposite", False), ("undecided", False)], "does not hold"),
        ([("opposite", True)], "does not hold"),
        ([("undecided", True)], "cannot be told here"),
        ([], "cannot be told here"),
    ],
)
def test_a_claim_follows_from_its_checks(outcomes, expected):
    assert verdict(outcomes) == expected
