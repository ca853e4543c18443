"""Figures of comparisons: null models are lines, intervals are bars, and a point is filled if its
interval excludes 0."""

import numpy as np
import pandas as pd
import pytest

from nerve.report import figures_of_comparisons
from nerve.report.figures_of_comparisons import beside_nulls, contrasts, early_ranking
from nerve.report.style import COLORS, NULL_COLOR


def correlations(n_runs=1, **changes):
    """The interval of SE_pre contains 0, that of PR_post does not."""
    rows = [
        {"metric": metric, "pearson": r, "r_clock": -0.9, "given_clock": given, "r_lr": np.nan}
        | {"given_clock_low": given - 0.2, "given_clock_high": given + 0.2, "given_lr": np.nan}
        for _ in range(n_runs)
        for metric, r, given in (("se_pre", -0.95, -0.1), ("pr_post", -0.7, 0.5))
    ]
    return pd.DataFrame(rows).assign(**changes)


NAMES = {"clock": "the clock", "lr": "the rate"}


def finite(line):
    return [x for x in line.get_xdata() if np.isfinite(x)]


def filled(panel, color):
    """The x values of filled points, and of hollow points that have an x."""
    lines = [line for line in panel.lines if line.get_marker() == "o"]
    return (
        [
            x
            for line in lines
            if line.get_markerfacecolor() == face
            for x in line.get_xdata()
            if x == x
        ]
        for face in (color, "white")
    )


def test_r_is_shown_with_that_of_the_clock_and_the_partial_r():
    figure = beside_nulls(correlations(), ["clock", "lr"], NAMES, "title")
    of_r, given = figure.axes  # the rate does not vary: no panel
    lines = [line.get_xdata()[0] for line in of_r.lines if line.get_color() == COLORS["post"]]
    assert sorted(lines) == [-0.9, 0.9]
    assert [tick.get_text() for tick in of_r.get_yticklabels()] == ["SE pre", "PR post"]
    assert given.get_xlabel() == "partial r given the clock"
    beyond, within = filled(given, COLORS["pre"])
    assert (beyond, within) == ([0.5], [-0.1])
    (bars,) = given.collections
    spans = [segment[:, 0].tolist() for segment in bars.get_segments()]
    assert spans == [pytest.approx([-0.3, 0.1]), pytest.approx([0.3, 0.7])]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["r of a metric", "± r of the clock"]


def test_points_of_many_runs_have_no_bars_and_do_not_hide_each_other():
    n = figures_of_comparisons.MAX_INTERVALS + 1
    of_r, given = beside_nulls(correlations(n), ["clock"], NAMES, "t").axes
    assert not given.collections
    places = [y for line in of_r.lines if line.get_marker() == "o" for y in line.get_ydata()]
    assert len(set(places)) == 2 * n


def test_early_ranking_shows_the_loss_the_metric_and_its_partial_tau_with_the_null():
    steps = [0, 10, 20]
    table = pd.DataFrame({"metric": "pr_post", "step": steps, "kendall": [-0.1, -0.5, -0.6]})
    table["loss_kendall"], table["given_loss"] = [0.0, 0.7, 1.0], [-0.1, -0.3, np.nan]
    table["null"] = [0.0, -0.05, np.nan]
    for name in ("kendall", "given_loss"):
        table[f"{name}_low"], table[f"{name}_high"] = table[name] - 0.1, table[name] + 0.1
    (panel,) = early_ranking(table, "t").axes
    drawn = {(line.get_color(), line.get_linestyle()): line.get_ydata() for line in panel.lines}
    np.testing.assert_array_equal(drawn[COLORS["pre"], "-"], table["given_loss"])
    np.testing.assert_array_equal(drawn[COLORS["pre"], ":"], table["null"])
    np.testing.assert_array_equal(drawn[COLORS["post"], "-"], table["kendall"])
    band = panel.collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((-0.4, 0.0))


def contrast(metric, difference, outcome, where="", unit=""):
    return {
        "level": "relu",
        "other": "gelu",
        "where": where,
        "metric": metric,
        "unit": unit,
        "difference": difference,
        "low": difference - 1,
        "high": difference + 1,
        "outcome": outcome,
    }


def test_contrasts_are_rows_and_what_is_undecided_is_gray():
    table = pd.DataFrame(
        [
            contrast("val_loss", 2.0, "higher", "model.d_model=64 ffn.width=4"),
            contrast("pr_post", 0.5, "within noise", "model.d_model=64 ffn.width=4", "nats"),
            contrast("val_loss", 3.0, "undecided", "model.d_model=64 ffn.width=8"),
            contrast("eee_post", 0.1, "higher", "model.d_model=64 ffn.width=8"),
        ]
    )
    loss, pr_post, eee_post = contrasts(table, "t").axes
    labels = [tick.get_text() for tick in loss.get_yticklabels()]
    assert labels == ["relu − gelu\nffn.width=4", "relu − gelu\nffn.width=8"]
    beyond, _ = filled(loss, COLORS["pre"])
    undecided, _ = filled(loss, NULL_COLOR)
    assert (beyond, undecided) == ([2.0], [3.0])
    assert loss.get_xlabel() == "difference\n(nats)"
    beyond, within = filled(pr_post, COLORS["pre"])
    assert (beyond, within) == ([], [0.5])
    assert pr_post.get_xlabel().startswith("difference of logarithms")
    assert eee_post.get_xlabel() == "difference"  # 0 is no flat spectrum here


def test_many_levels_are_each_compared_with_the_first():
    pairs = [("2", "1"), ("4", "1"), ("8", "1"), ("4", "2"), ("8", "2"), ("8", "4")]
    rows = [contrast("val_loss", 1.0, "higher") | {"level": a, "other": b} for a, b in pairs]
    (panel,) = contrasts(pd.DataFrame(rows), "t").axes
    labels = [tick.get_text() for tick in panel.get_yticklabels()]
    assert labels == ["2 − 1", "4 − 1", "8 − 1"]


def test_settings_of_other_factors_are_ordered_by_their_size():
    settings = ["w=0.02", "w=0.004 n=a", "w=-0.02", "w=8/3", "w=10", "w=relu"]
    rows = [contrast("val_loss", 1.0, "higher", setting) for setting in settings[::-1]]
    (panel,) = contrasts(pd.DataFrame(rows), "t").axes
    labels = [tick.get_text().split("\n")[1] for tick in panel.get_yticklabels()]
    assert labels == ["w=-0.02", "w=0.004 n=a", "w=0.02", "w=8/3", "w=10", "w=relu"]


def test_only_the_first_of_very_many_contrasts_are_drawn():
    n = figures_of_comparisons.MAX_CONTRASTS + 3
    table = pd.DataFrame([contrast("val_loss", i, "higher", f"a={i}") for i in range(n)])
    (panel,) = contrasts(table, "t").axes
    assert len(panel.get_yticks()) == figures_of_comparisons.MAX_CONTRASTS
