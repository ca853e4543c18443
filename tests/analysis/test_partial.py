"""Partial correlations against the textbook, and intervals that contain the true value."""

import numpy as np
import pytest
from scipy import stats

from nerve.analysis.partial import (
    block_weights,
    cluster_weights,
    interval_of_draws,
    partial_correlation,
    partial_over_runs,
    partial_over_steps,
)

STEPS = np.arange(10, 410, 10)
CLOCK = np.log1p(STEPS)


def independent(n_series, n, alike=0.0, seed=0):
    """Pairs of independent series with AR(1) errors, with a clock that both follow."""
    rng = np.random.default_rng(seed)
    x, y = np.zeros((2, n_series, n + 50))
    for i in range(1, n + 50):
        x[:, i], y[:, i] = alike * np.stack([x[:, i - 1], y[:, i - 1]]) + rng.normal(
            size=(2, n_series)
        )
    clock = np.log1p(np.linspace(1000 / n, 1000, n))
    return 5 * clock + 0.1 * x[:, 50:], -2 * clock + 0.1 * y[:, 50:], clock


def over_steps(x, y, z):
    """`partial_over_steps` for series in rows, flattened."""
    n_series, n = x.shape
    codes = np.repeat(np.arange(n_series), n)
    found = partial_over_steps(codes, x.reshape(1, -1), y.ravel(), np.tile(z, n_series), n_series)
    return found[:, 0]


def textbook(x, y, z):
    xy, xz, yz = (stats.pearsonr(*pair).statistic for pair in ((x, y), (x, z), (y, z)))
    return (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))


def test_partial_correlation_is_the_textbook_formula():
    x, y, z = np.random.default_rng(0).normal(size=(3, 5, 20))
    expected = [textbook(*own) for own in zip(x, y, z, strict=True)]
    assert partial_correlation(x, y, [z]) == pytest.approx(np.array(expected))
    assert partial_correlation(x[0], y[0]) == pytest.approx(stats.pearsonr(x[0], y[0]).statistic)
    assert np.isnan(partial_correlation(2 * z + 1, y, [z])).all()  # nothing is left


def test_a_pure_clock_has_a_partial_r_of_zero_within_its_interval():
    """Metric and loss follow log(step + 1) and nothing else: r is -1 to two digits."""
    x, y, clock = independent(1, 40)
    assert stats.pearsonr(x[0], y[0]).statistic < -0.99
    r, low, high = over_steps(x, y, clock)[:, 0]
    assert r == pytest.approx(textbook(x[0], y[0], clock))
    assert low < 0 < high
    assert high - low < 1


@pytest.mark.parametrize("n", [8, 20, 40])
@pytest.mark.parametrize("alike", [0.0, 0.5, 0.8])
def test_intervals_over_steps_contain_the_true_value(n, alike):
    """In 86 to 98% of 400 pairs of independent series; autocorrelated errors reduce the coverage
    below the nominal 95%, as the docstring says."""
    _, low, high = over_steps(*independent(400, n, alike))
    assert 0.86 <= np.mean((low <= 0) & (high >= 0)) <= 0.98


def test_a_correlation_beyond_the_clock_is_found():
    x, y, clock = independent(1, 40)
    r, low, high = over_steps(x, y + 0.8 * (x - 5 * clock), clock)[:, 0]
    assert 0 < low < r < high < 1


def test_interleaved_series_with_gaps_equal_separate_ones():
    """Two interleaved series, one with missing values, and one of three points."""
    x, y, clock = independent(2, 20)
    x[1, 3] = y[1, 7] = np.nan
    codes = np.tile([0, 1], 20)
    short = np.array([1.0, 2.0, 4.0])
    found = partial_over_steps(
        np.concatenate([codes, [2, 2, 2]]),
        np.concatenate([x.T.ravel(), short])[None],
        np.concatenate([y.T.ravel(), short**2]),
        np.concatenate([np.repeat(clock, 2), short[::-1]]),
        3,
    )[:, 0]
    alone = over_steps(x[:1], y[:1], clock)
    kept = np.isfinite(x[1] + y[1])
    gaps = over_steps(x[1:, kept], y[1:, kept], clock[kept])
    assert found[:, :2] == pytest.approx(np.hstack([alone, gaps]))
    assert np.isnan(found[:, 2]).all()


def test_rounding_alone_gives_no_partial_r():
    """A constant null model: nothing was given. A constant metric: the PR gain of the identity is
    1."""
    x, y, clock = independent(1, 20)
    ones = 1 + np.tile([0.0, 2e-16, 4e-16, 0.0], 5)
    assert np.isnan(over_steps(x, y, np.zeros(20))).all()
    assert np.isnan(over_steps(x, y, ones)).all()
    assert np.isnan(over_steps(ones[None], y, clock)).all()
    assert np.isnan(over_steps(x, ones[None], clock)).all()


def test_few_points_have_no_interval():
    x, y, clock = independent(1, 7)
    r, low, high = over_steps(x, y, clock)[:, 0]
    assert np.isfinite(r)
    assert np.isnan([low, high]).all()


def test_over_runs_seeds_of_a_design_are_drawn_together():
    """With ten seeds of each of 12 designs, as wide as for 12 designs alone, not as for 120
    runs."""
    rng = np.random.default_rng(3)
    x, y, z = rng.normal(size=(3, 12))
    zeros = np.zeros(12, dtype=int)
    alone = partial_over_runs(zeros, np.arange(12), x, y, z, 1)[:, 0]
    often = [np.repeat(values, 10) for values in (zeros, np.arange(12), x, y, z)]
    seeds = partial_over_runs(*often, 1)[:, 0]
    assert seeds == pytest.approx(alone)
    loose = partial_over_runs(often[0], np.arange(120), *often[2:], 1)[:, 0]
    assert loose[2] - loose[1] < 0.5 * (seeds[2] - seeds[1])


def test_intervals_over_runs_contain_the_true_value():
    """Metric and loss both follow the width of 12 designs: 90 to 99% of 200 intervals contain 0."""
    rng = np.random.default_rng(4)
    width = np.arange(1.0, 13.0)
    codes = np.repeat(np.arange(200), 12)
    x, y = (np.tile(sign * width, 200) + rng.normal(size=2400) for sign in (1, -1))
    _, low, high = partial_over_runs(
        codes, np.tile(np.arange(12), 200), x, y, np.tile(width, 200), 200
    )
    assert 0.9 <= np.mean((low <= 0) & (high >= 0)) <= 0.99


def test_several_metrics_at_once_equal_separate_ones():
    """With and without missing values in one of them."""
    x, y, clock = independent(6, 30)
    codes, z = np.repeat([0, 1], 30), np.tile(clock, 2)
    several, loss = x.reshape(3, -1), y[:2].ravel()
    for gap in (0.0, np.nan):
        several[1, 4] += gap
        found = partial_over_steps(codes, several, loss, z, 2)
        for place, own in enumerate(several):
            alone = partial_over_steps(codes, own[None], loss, z, 2)[:, 0]
            np.testing.assert_allclose(found[:, place], alone, rtol=1e-9)


def test_bootstrap_weights_count_draws():
    """Each draw has n values; blocks contain consecutive steps; clusters share their counts."""
    weights = block_weights(16)
    assert (weights.sum(axis=1) == 16).all()
    assert ((weights > 0) == (np.roll(weights, 1, axis=1) > 0)).mean() > 0.6
    clusters = cluster_weights(np.array([0, 0, *range(1, 9)]))
    assert (clusters[:, 0] == clusters[:, 1]).all()
    assert cluster_weights(np.arange(7)) is None


def test_quantiles_of_draws_are_numpys_and_leave_missing_ones_out():
    draws = np.random.default_rng(0).normal(size=(101, 3))
    draws[:20, 1] = np.nan
    draws[:60, 2] = np.nan
    low, high = interval_of_draws(draws)
    for ends, level in ((low, 0.025), (high, 0.975)):
        assert ends[0] == pytest.approx(np.quantile(draws[:, 0], level))
        assert ends[1] == pytest.approx(np.quantile(draws[20:, 1], level))
        assert np.isnan(ends[2])  # more than half is missing
