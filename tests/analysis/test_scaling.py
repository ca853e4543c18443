"""The power law of width: exact ones are recovered, seeds do not count as widths, and few widths
give no interval."""

import numpy as np
import pytest
import scipy.stats

from nerve.analysis.compare import average_seeds, final_metrics
from nerve.analysis.scaling import fit_width_scaling
from nerve.storage.find import IncompleteWarning


def width(d_ff, pr_post, seed=0, loss=5.0, **more):
    row = {"step": 10, "d_ff": d_ff, "pr_post": pr_post, "se_post": np.log(pr_post) * 0.5}
    return {
        "rows": [row | {"val_loss": loss}],
        "seed": seed,
        "config": {"ffn.d_ff": d_ff},
    } | more


def of(frame, metric="pr_post"):
    (row,) = frame[frame["metric"] == metric].itertuples()
    return row


def test_an_exact_power_law(tables):
    """PR = 2 · d^.75 and exp(SE) = √PR = √2 · d^.375, with intervals of zero width."""
    points = final_metrics(*tables(*(width(d, 2 * d**0.75) for d in (64, 128, 256, 512))))
    row = of(fit_width_scaling(points))
    assert (row.n, row.n_points, row.d_ff_min, row.d_ff_max) == (4, 4, 64, 512)
    assert row.exponent == pytest.approx(0.75)
    assert row.coefficient == pytest.approx(2)
    assert row.r_squared == pytest.approx(1)
    assert (row.exponent_low, row.exponent_high) == pytest.approx((0.75, 0.75), abs=1e-6)
    row = of(fit_width_scaling(points), "exp_se_post")
    assert row.exponent == pytest.approx(0.375)
    assert row.coefficient == pytest.approx(2**0.5)


def test_the_interval_is_scipys(tables):
    widths, values = np.array([64, 128, 256, 512, 1024]), np.array([20.0, 45, 60, 140, 150])
    points = final_metrics(
        *tables(*(width(int(d), v) for d, v in zip(widths, values, strict=True)))
    )
    row = of(fit_width_scaling(points))
    expected = scipy.stats.linregress(np.log(widths), np.log(values))
    half = scipy.stats.t.ppf(0.975, 3) * expected.stderr
    assert row.exponent == pytest.approx(expected.slope)
    assert row.exponent_low == pytest.approx(expected.slope - half)
    assert row.exponent_high == pytest.approx(expected.slope + half)
    assert row.r_squared == pytest.approx(expected.rvalue**2)


def test_more_seeds_do_not_add_widths(tables):
    """Runs at PR · 2 and PR / 2 have the mean logarithm of PR: the same fit and interval."""
    values = {64: 10.0, 128: 25.0, 256: 30.0}
    seeds = [
        width(d, v * factor, seed)
        for d, v in values.items()
        for seed, factor in enumerate((2, 0.5))
    ]
    points = final_metrics(*tables(*seeds))
    row = of(fit_width_scaling(points))
    assert (row.n, row.n_points) == (3, 6)
    expected = scipy.stats.linregress(np.log([*values]), np.log([*values.values()]))
    assert row.exponent == pytest.approx(expected.slope)
    half = scipy.stats.t.ppf(0.975, 1) * expected.stderr
    assert row.exponent_high == pytest.approx(expected.slope + half)
    assert of(fit_width_scaling(average_seeds(points))).n == 3


def test_two_widths_have_no_interval_and_one_no_exponent(tables):
    points = final_metrics(*tables(width(64, 10), width(128, 20)))
    row = of(fit_width_scaling(points))
    assert row.exponent == pytest.approx(1)
    assert np.isnan([row.exponent_low, row.exponent_high, row.r_squared]).all()
    row = of(fit_width_scaling(points[:1]))
    assert row.n == 1
    assert np.isnan([row.exponent, row.coefficient]).all()


def test_flagged_and_dead_runs_are_counted(tables):
    dead = width(1024, 1)
    dead["rows"][0]["pr_post"] = None
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables(
            width(64, 10), width(128, 20), width(256, 7, loss=9.0), dead, {"rows": []}
        )
    points = final_metrics(metrics, runs)
    row = of(fit_width_scaling(points))
    assert (row.n, row.n_flagged, row.n_missing, row.d_ff_max) == (2, 2, 1, 128)
    row = of(fit_width_scaling(points, flagged=True))
    assert (row.n, row.n_flagged, row.d_ff_max) == (3, 2, 256)


def test_groups(tables):
    specs = [
        width(d, d**exponent, config={"activation.name": name, "ffn.d_ff": d})
        for name, exponent in (("gelu", 0.5), ("relu", 1.0))
        for d in (64, 128, 256)
    ]
    points = final_metrics(*tables(*specs), ["activation.name"])
    rows = fit_width_scaling(points, ["activation.name"], names=["pr_post"])
    assert list(rows["activation.name"]) == ["gelu", "relu"]
    assert list(rows["exponent"]) == pytest.approx([0.5, 1])
