"""Figures of several runs: seeds are averaged, levels colored, and nothing is pooled silently."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from nerve.report import figures_of_several_runs
from nerve.report.style import LEVEL_COLORS


def curves(n_designs: int = 2, seeds: tuple[int, ...] = (0, 1), **changes) -> pd.DataFrame:
    """Rows of `depth_means`: design i has the value i + seed in every metric, at two steps."""
    rows = [
        {
            "run_id": f"{design}-{seed}",
            "design_id": f"design {design}",
            "data": "d",
            "activation.name": ("gelu", "relu")[design % 2],
            "optimizer.lr": 0.001 * (design // 2 + 1),
            "step": step,
            "layer": layer,
            "depth": (layer + 0.5) / 2,
            **dict.fromkeys(
                (*figures_of_several_runs.CURVES, *figures_of_several_runs.LAYERS),
                1.0 + design + seed,
            ),
        }
        for design in range(n_designs)
        for seed in seeds
        for step in (0, 10)
        for layer in (0, 1)
    ]
    return pd.DataFrame(rows).assign(**changes)


def layers(**changes) -> pd.DataFrame:
    frame = curves(**changes)
    return frame[frame["step"] == 10]


def test_a_line_is_the_mean_over_seeds_and_its_band_their_range():
    """By hand: seeds at 1 and 2 have the mean 1.5."""
    figure = figures_of_several_runs.curves_by_factor(curves(), "activation.name", [], "t")
    panel = figure.axes[1]
    gelu, relu = panel.lines
    np.testing.assert_array_equal(gelu.get_xdata(), [0, 10])
    np.testing.assert_allclose(gelu.get_ydata(), [1.5, 1.5])
    np.testing.assert_allclose(relu.get_ydata(), [2.5, 2.5])
    assert [gelu.get_color(), relu.get_color()] == list(LEVEL_COLORS[:2])
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (1, 2)
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "activation.name"
    assert [text.get_text() for text in legend.get_texts()] == ["gelu", "relu"]


def test_a_loss_that_was_not_evaluated_at_every_step_is_a_line():
    """Without markers, points between gaps would be invisible; metrics keep their gaps."""
    frame = curves()
    more = frame[frame["step"] == 0].assign(step=5, val_loss=np.nan, pr_pre=np.nan)
    figure = figures_of_several_runs.curves_by_factor(
        pd.concat([frame, more]), "activation.name", [], "t"
    )
    loss, metric = (
        figure.axes[figures_of_several_runs.CURVES.index(n)] for n in ("val_loss", "pr_pre")
    )
    np.testing.assert_array_equal(loss.lines[0].get_xdata(), [0, 10])
    assert np.isnan(metric.lines[0].get_ydata()).tolist() == [False, True, False]


def test_panels_are_named_with_units():
    figure = figures_of_several_runs.curves_by_factor(curves(), "activation.name", [], "title")
    assert figure.get_suptitle() == "title"
    assert [panel.get_title() for panel in figure.axes] == [
        "validation loss",
        "SE pre",
        "PR pre",
        "EEE pre",
        "JS",
        "SE post",
        "PR post",
        "EEE post",
    ]
    assert {panel.get_xlabel() for panel in figure.axes} == {"optimizer step"}
    assert figure.axes[1].get_ylabel() == "SE (nats)"


def test_other_factors_are_distinguished_by_dashes():
    figure = figures_of_several_runs.curves_by_factor(
        curves(4), "activation.name", ["optimizer.lr"], "t"
    )
    lines = figure.axes[0].lines
    assert len(lines) == 4
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == 4
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["gelu", "relu", "optimizer.lr = 0.001", "optimizer.lr = 0.002"]


def test_a_design_on_other_data_is_another_line():
    frame = pd.concat([curves(1), curves(1, data="other")])
    figure = figures_of_several_runs.curves_by_factor(frame, "activation.name", [], "t")
    assert len(figure.axes[0].lines) == 2


def test_many_designs_are_drawn_as_the_median_of_each_level():
    """60 designs of two levels: the even ones, 1, 3, …, 59, have the median 30."""
    figure = figures_of_several_runs.curves_by_factor(
        curves(60, (0,)), "activation.name", ["optimizer.lr"], "t"
    )
    gelu, relu = figure.axes[0].lines
    np.testing.assert_allclose(gelu.get_ydata(), 30)
    np.testing.assert_allclose(relu.get_ydata(), 31)
    band = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(1 + np.quantile(np.arange(0, 60, 2), 0.1))
    assert band.max() == pytest.approx(1 + np.quantile(np.arange(0, 60, 2), 0.9))


def test_a_run_with_one_step_is_a_point():
    long, short = curves(1), curves(2)
    frame = pd.concat([long, short[(short["activation.name"] == "relu") & (short["step"] == 0)]])
    figure = figures_of_several_runs.curves_by_factor(frame, "activation.name", [], "t")
    assert [line.get_marker() for line in figure.axes[0].lines] == ["", "."]


def test_a_median_uses_the_same_designs_along_its_line():
    """40 designs end at step 10; others, ten times as high, also have steps 5 and 20. Other data
    have a separate line."""
    many = curves(80, (0,))
    few = curves(4, (0,)).replace({"step": {0: 5, 10: 20}})
    few["design_id"] += " longer"
    few[["val_loss", "pr_post"]] *= 10
    other = curves(2, (0,), data="other")
    frame = pd.concat([many, few, other])
    figure = figures_of_several_runs.curves_by_factor(frame, "activation.name", [], "t")
    lines = figure.axes[0].lines
    assert len(lines) == 4
    for line, height in zip(lines, (40, 41, 1, 2), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [0, 10])
        np.testing.assert_allclose(line.get_ydata(), height)
    assert len({line.get_linestyle() for line in lines}) == 2
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["gelu", "relu", "data d", "data other"]


def test_layers_at_the_last_step():
    figure = figures_of_several_runs.layers_by_factor(layers(), "activation.name", [], "t")
    assert [panel.get_title() for panel in figure.axes] == [
        "PR pre",
        "PR post",
        "PR gain",
        "variance outside",
    ]
    assert {panel.get_xlabel() for panel in figure.axes} == {"layer"}
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0, 1])


def test_runs_of_different_depth_are_drawn_over_relative_depth():
    deep, shallow = layers(n_designs=2, seeds=(0,)), layers(n_designs=1, seeds=(0,))
    frame = pd.concat([deep[deep["design_id"] == "design 1"], shallow[shallow["layer"] == 0]])
    figure = figures_of_several_runs.layers_by_factor(frame, "activation.name", [], "t")
    assert {panel.get_xlabel() for panel in figure.axes} == {
        "depth, (layer + ½) / number of layers"
    }
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [0.25, 0.75])


def points(n: int = 3, spread: float = 0.1) -> pd.DataFrame:
    loss = 3.0 + np.arange(n)
    values = dict.fromkeys(figures_of_several_runs.SCATTERED, 10 - loss)
    spreads = {f"{name}_sd": spread for name in (*figures_of_several_runs.SCATTERED, "val_loss")}
    return pd.DataFrame({"activation.name": "gelu", "val_loss": loss, **values, **spreads})


CORRELATION = pd.DataFrame(
    {
        "metric": list(figures_of_several_runs.SCATTERED),
        "n": 3,
        "pearson": -1.0,
        "pearson_low": np.nan,
        "pearson_high": np.nan,
        "spearman": -0.5,
    }
)


def test_loss_against_metrics_has_a_point_with_bars_per_design():
    figure = figures_of_several_runs.loss_against_metrics(
        points(), CORRELATION, "activation.name", "t"
    )
    panel = figure.axes[0]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("validation loss (nats)", "SE (nats)")
    assert panel.get_title() == "SE pre\nr −1.00, ρ −0.50, n 3"
    (container,) = panel.containers
    np.testing.assert_allclose(container.lines[0].get_xdata(orig=False), [3, 4, 5])
    np.testing.assert_allclose(container.lines[0].get_ydata(orig=False), [7, 6, 5])
    assert to_rgba(container.lines[0].get_color()) == to_rgba(LEVEL_COLORS[0])
    (horizontal, vertical) = container.lines[2]
    np.testing.assert_allclose(horizontal.get_segments()[0], [[2.9, 7], [3.1, 7]])
    np.testing.assert_allclose(vertical.get_segments()[0], [[3, 6.9], [3, 7.1]])
    with_interval = CORRELATION.assign(pearson_low=-1.0, pearson_high=0.25)
    figure = figures_of_several_runs.loss_against_metrics(points(), with_interval, None, "t")
    assert figure.axes[0].get_title() == "SE pre\nr −1.00 [−1.00, +0.25], ρ −0.50, n 3"


def test_one_seed_has_no_bars_and_a_missing_metric_no_point():
    frame = points(spread=np.nan)
    frame.loc[0, "se_pre"] = np.nan
    frame["js"] = np.nan
    figure = figures_of_several_runs.loss_against_metrics(
        frame, CORRELATION, "activation.name", "t"
    )
    (container,) = figure.axes[0].containers
    np.testing.assert_allclose(container.lines[0].get_xdata(orig=False), [4, 5])
    assert container.lines[2] == ()
    assert [text.get_text() for text in figure.axes[3].texts] == [
        "no run with this metric and a loss"
    ]
