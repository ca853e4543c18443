"""Grouped statistics against SciPy, group by group, and missing values where nothing can be
computed."""

import numpy as np
import pytest
import scipy.stats

from nerve.analysis import statistics
from nerve.analysis.statistics import (
    Pairs,
    correlation,
    fit_line,
    pearson_interval,
    spearman_interval,
    student_t,
)


@pytest.fixture
def groups():
    """Forty groups of 5 to 60 correlated pairs in mixed order, with ties and missing values."""
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(40), rng.integers(5, 61, 40))
    rng.shuffle(codes)
    x = rng.normal(size=len(codes)).round(1) + 1e3 * codes
    y = 0.5 * x + rng.normal(size=len(codes)).round(1)
    x[rng.random(len(x)) < 0.05] = np.nan
    y[rng.random(len(y)) < 0.05] = np.inf
    return codes, x, y


def of_group(groups, code):
    codes, x, y = groups
    kept = (codes == code) & np.isfinite(x) & np.isfinite(y)
    return x[kept], y[kept]


def test_pearson_and_spearman_are_scipys(groups):
    pairs = Pairs.of(*groups, 40)
    pearson, spearman = correlation(pairs), correlation(pairs.ranked())
    for code in range(40):
        x, y = of_group(groups, code)
        assert pairs.n[code] == len(x)
        assert pearson[code] == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=1e-9)
        assert spearman[code] == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)


def test_ranks_by_hand():
    """Equal values have their mean rank; each group counts from 1."""
    codes = np.array([1, 0, 1, 0, 1, 1])
    x = np.array([5.0, 2.0, 3.0, 1.0, 5.0, 9.0])
    ranked = Pairs.of(codes, x, -x, 2).ranked()
    assert ranked.x.tolist() == [2, 1, 2.5, 1, 2.5, 4]
    assert ranked.y.tolist() == [1, 2, 2.5, 4, 2.5, 1]


def test_a_large_mean_costs_no_digits():
    """The numbers are shifted before they are squared."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 50))
    zeros = np.zeros(50, dtype=np.int64)
    plain = correlation(Pairs.of(zeros, x, y, 1))
    shifted = correlation(Pairs.of(zeros, x + 1e8, y - 1e8, 1))
    assert shifted[0] == pytest.approx(plain[0], abs=1e-7)


def test_rounding_alone_gives_no_r():
    """The steps of a straight line in floating point."""
    x = np.diff([0.7, 0.6, 0.5, 0.4, 0.3])
    assert len(set(x)) > 1
    zeros = np.zeros(4, dtype=np.int64)
    assert np.isnan(correlation(Pairs.of(zeros, x, np.array([1.0, 2.0, 4.0, 3.0]), 1)))


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1.0, 2.0], [1.0, 2.0]),
        ([0.1, 0.1, 0.1, 0.1], [1.0, 2.0, 3.0, 4.0]),
        ([1.0, 2.0, 3.0, 4.0], [0.3, 0.3, 0.3, 0.3]),
        ([1.0, np.nan, 3.0, 4.0], [1.0, 2.0, np.nan, 4.0]),
    ],
    ids=["nothing", "two", "x constant", "y constant", "two left"],
)
def test_undefined_correlations_are_missing(x, y):
    """Next to a group that has one, which is unchanged."""
    codes = np.array([0] * len(x) + [1] * 3)
    pairs = Pairs.of(codes, np.array([*x, 1, 2, 3.0]), np.array([*y, 3, 2, 1.0]), 2)
    for r in (correlation(pairs), correlation(pairs.ranked())):
        assert np.isnan(r[0])
        assert r[1] == pytest.approx(-1)


def test_negative_codes_belong_to_no_group():
    pairs = Pairs.of(np.array([0, -1, 0, 0]), np.arange(4.0), np.arange(4.0), 1)
    assert pairs.n.tolist() == [3]


def test_lines_are_scipys(groups):
    line = fit_line(Pairs.of(*groups, 40))
    for code in range(40):
        x, y = of_group(groups, code)
        expected = scipy.stats.linregress(x, y)
        half = scipy.stats.t.ppf(0.975, len(x) - 2) * expected.stderr
        assert line.slope[code] == pytest.approx(expected.slope, rel=1e-9)
        assert line.intercept[code] == pytest.approx(expected.intercept, rel=1e-6, abs=1e-6)
        assert line.low[code] == pytest.approx(expected.slope - half, rel=1e-9)
        assert line.high[code] == pytest.approx(expected.slope + half, rel=1e-9)
        assert line.r_squared[code] == pytest.approx(expected.rvalue**2, rel=1e-9)


def test_a_line_through_few_points():
    """One point has no line; two have one without an interval; three on a line have an interval of
    zero width."""
    codes = np.array([0, 1, 1, 2, 2, 2, 3, 3])
    x = np.array([1.0, 1, 2, 1, 2, 3, 7, 7])
    y = np.array([5.0, 1, 3, 3, 5, 7, 1, 2])
    line = fit_line(Pairs.of(codes, x, y, 4))
    np.testing.assert_allclose(line.slope, [np.nan, 2, 2, np.nan])
    np.testing.assert_allclose(line.intercept, [np.nan, -1, 1, np.nan])
    np.testing.assert_allclose(line.low, [np.nan, np.nan, 2, np.nan])
    np.testing.assert_allclose(line.high, [np.nan, np.nan, 2, np.nan])
    np.testing.assert_allclose(line.r_squared, [np.nan, np.nan, 1, np.nan])


def test_student_t_is_scipys():
    free = np.array([0, *range(1, 260), 500, 2000, 10**4, 10**9, 3, -1])
    known = free > 0
    expected = scipy.stats.t.ppf(0.975, free[known])
    # SciPy before 1.17 is 4e-11 off.
    np.testing.assert_allclose(student_t(free)[known], expected, rtol=1e-10)
    assert np.isnan(student_t(free)[~known]).all()


def test_student_t_takes_a_series_only_for_few_degrees_of_freedom(monkeypatch):
    """Halves of many runs have thousands of different ones, and each series takes 10 ms."""
    asked = []
    monkeypatch.setattr(statistics, "_student_t", lambda free: asked.append(free) or 2.0)
    student_t(np.arange(-5, 10_000))
    assert asked == [*range(1, statistics.MANY)]
    assert student_t(np.array([[1, 300]])).shape == (1, 2)
    assert student_t(np.empty(0, int)).shape == (0,)


def test_the_pearson_interval_is_scipys():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 9))
    expected = scipy.stats.pearsonr(x, y)
    low, high = pearson_interval(np.array([expected.statistic]), np.array([9]))
    assert (low[0], high[0]) == pytest.approx(expected.confidence_interval(0.95), rel=1e-12)


def test_the_spearman_interval_by_hand():
    """r = .5, n = 28: z = .54931 ± 1.95996 · √(1.125/25) = .13353, .96508."""
    low, high = spearman_interval(np.array([0.5]), np.array([28]))
    assert low[0] == pytest.approx(np.tanh(0.549306 - 0.415772), abs=1e-6)
    assert high[0] == pytest.approx(np.tanh(0.549306 + 0.415772), abs=1e-6)


@pytest.mark.parametrize("interval", [pearson_interval, spearman_interval])
def test_undefined_intervals_are_missing(interval):
    """For three points, at ±1 and what rounds to it, and without a correlation."""
    ends = interval(np.array([0.5, 1.0, -1 + 2e-16, np.nan]), np.array([3, 100, 100, 100]))
    assert np.isnan(ends).all()
