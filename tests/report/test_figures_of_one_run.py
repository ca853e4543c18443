"""Figures of one run show what was measured: axes, series and limits, not pixels."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import LogNorm, to_rgb

from nerve.report import figures_of_one_run
from nerve.report.style import COLORS, LOSS_COLOR

STEPS = (0, 10, 30)
CORRELATIONS = pd.DataFrame(
    {"metric": ["se_pre", "se_post", "js"], "pearson": [-0.98, np.nan, 0.5]}
)


def measured(n_layers: int = 3, steps: tuple[int, ...] = STEPS) -> pd.DataFrame:
    """Rows of one run whose values are functions of step and layer."""
    step, layer = (grid.ravel() for grid in np.meshgrid(steps, range(n_layers), indexing="ij"))
    frame = pd.DataFrame({"step": step, "layer": layer, "ffn": "ffn", "d_ff": 16, "status": "ok"})
    frame = frame.assign(
        rank_limit_pre=4,
        se_pre=0.5 + 0.1 * layer + step / 100,
        se_post=1.0 + 0.1 * layer + step / 100,
        pr_pre=1.5 + 0.2 * layer,
        pr_post=(1.5 + 0.2 * layer) * (1 + layer),
        eee_pre=0.9 - 0.01 * layer,
        eee_post=0.8 - 0.1 * layer + step / 100,
        js=0.01 * (1 + layer + step),
        val_loss=5 - step / 30,
        lr=0.001 * (30 - step),
    )
    return frame.assign(
        pr_gain=frame["pr_post"] / frame["pr_pre"],
        delta_eee=frame["eee_post"] - frame["eee_pre"],
        variance_outside=0.1 * layer,
    )


def unmeasured(frame: pd.DataFrame, rows: slice = slice(None)) -> pd.DataFrame:
    names = ["se_pre", "se_post", "pr_pre", "pr_post", "eee_pre", "eee_post", "js"]
    frame = frame.copy()
    frame.loc[frame.index[rows], [*names, "pr_gain", "delta_eee", "variance_outside"]] = np.nan
    return frame.assign(status="no variance")


def line_of(panel, color):
    (line,) = [
        line for line in panel.lines if line.get_color() == color and line.get_linestyle() == "-"
    ]
    return line


def texts_of(figure):
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_overview_lines_are_means_over_layers_and_bands_one_sd():
    """By hand for three layers that are 0.1 apart: SD .1."""
    figure = figures_of_one_run.overview(measured(), CORRELATIONS, "run x")
    panel = figure.axes[0]
    line = line_of(panel, COLORS["pre"])
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_allclose(line.get_ydata(), [0.6, 0.7, 0.9])
    np.testing.assert_allclose(line_of(panel, COLORS["post"]).get_ydata(), [1.1, 1.2, 1.4])
    edges = panel.collections[0].get_paths()[0].vertices
    assert edges[edges[:, 0] == 10, 1].min() == pytest.approx(0.6)
    assert edges[edges[:, 0] == 10, 1].max() == pytest.approx(0.8)


def test_overview_has_units_correlations_loss_and_limits():
    """Limits by hand for r = 4 and D = 16: ln 4, 4 and 1 - 4/16."""
    figure = figures_of_one_run.overview(measured(), CORRELATIONS, "run x")
    panels = figure.axes[:4]
    assert [panel.get_ylabel() for panel in panels] == [
        "SE (nats)",
        "PR (dimensions)",
        "EEE (0 flat, 1 one direction)",
        "layer",
    ]
    assert {panel.get_xlabel() for panel in panels} == {"optimizer step"}
    assert panels[0].get_title() == "SE; r with loss: pre −0.98, post –"
    assert panels[3].get_title() == "JS; r with loss: +0.50"
    for panel, limit in zip(panels, (np.log(4), 4, 0.75), strict=False):
        (dotted,) = [line for line in panel.lines if line.get_linestyle() == ":"]
        assert dotted.get_ydata()[0] == pytest.approx(limit)
        assert dotted.get_color() == COLORS["pre"]
    twins = [axes for axes in figure.axes if axes.get_ylabel() == "validation loss (nats)"]
    assert len(twins) == 3
    for twin in twins:
        np.testing.assert_allclose(twin.lines[0].get_ydata(), [5, 5 - 1 / 3, 4])
        assert twin.lines[0].get_color() == LOSS_COLOR
    assert len(figure.legends) == 1


def test_heat_maps_are_layers_by_steps_with_edges_between_steps():
    figure = figures_of_one_run.overview(measured(), CORRELATIONS, "t")
    (mesh,) = [item for item in figure.axes[3].collections if hasattr(item, "get_coordinates")]
    by_layer = [[0.01, 0.11, 0.31], [0.02, 0.12, 0.32], [0.03, 0.13, 0.33]]
    np.testing.assert_allclose(mesh.get_array(), by_layer)
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-5, 5, 20, 40])
    np.testing.assert_allclose(mesh.get_coordinates()[:, 0, 1], [-0.5, 0.5, 1.5, 2.5])
    assert mesh.get_clim()[0] == 0


def test_gain_maps_are_symmetric_about_no_change():
    """The gain is at most 3: from 1/3 to 3, logarithmic; ΔEEE symmetric around 0."""
    figure = figures_of_one_run.gain_maps(measured(), "t")
    gain, delta = (panel.collections[0] for panel in figure.axes[:2])
    assert isinstance(gain.norm, LogNorm)
    np.testing.assert_allclose(gain.get_clim(), [1 / 3, 3])
    np.testing.assert_allclose(gain.get_array()[:, 0], [1, 2, 3])
    low, high = delta.get_clim()
    assert low == -high
    assert high == pytest.approx(np.abs(measured()["delta_eee"]).max())
    # Flattening (gain > 1, ΔEEE < 0) has one color in both.
    assert gain.cmap(1.0)[:3] == pytest.approx(delta.cmap(0.0)[:3])


def test_a_dead_layer_is_blank_in_maps_and_left_out_of_means():
    frame = measured()
    dead = frame["layer"] == 1
    frame.loc[dead, ["se_pre", "js", "pr_gain"]] = np.nan
    figure = figures_of_one_run.overview(frame, CORRELATIONS, "t")
    np.testing.assert_allclose(line_of(figure.axes[0], COLORS["pre"]).get_ydata()[0], 0.6)
    (mesh,) = [item for item in figure.axes[3].collections if hasattr(item, "get_coordinates")]
    assert np.ma.getmaskarray(mesh.get_array()).tolist() == [[False] * 3, [True] * 3, [False] * 3]
    gain = figures_of_one_run.gain_maps(frame, "t").axes[0].collections[0]
    assert np.ma.getmaskarray(gain.get_array())[1].all()


def test_a_figure_says_if_nothing_was_measured():
    frame = unmeasured(measured())
    overview = figures_of_one_run.overview(frame, CORRELATIONS.iloc[:0], "t")
    assert texts_of(overview) == ["nothing could be measured"] * 4
    assert texts_of(figures_of_one_run.gain_maps(frame, "t")) == ["nothing could be measured"] * 3
    overview.draw_without_rendering()


def test_one_layer_and_one_step_can_be_drawn():
    frame = measured(1, (0,))
    for figure in (
        figures_of_one_run.overview(frame, CORRELATIONS, "t"),
        figures_of_one_run.gain_maps(frame, "t"),
    ):
        figure.draw_without_rendering()
    mesh = figures_of_one_run.gain_maps(frame, "t").axes[0].collections[0]
    np.testing.assert_allclose(mesh.get_coordinates()[0, :, 0], [-0.5, 0.5])


@pytest.fixture
def stored() -> pd.DataFrame:
    """Spectra of eight layers at three steps: pre has rank 4 of 16, post falls like 1/k."""
    pre = np.array([8.0, 4.0, 2.0, 2.0, *[0.0] * 12], dtype=np.float32)
    post = (1 / np.arange(1, 17)).astype(np.float32)
    rows = [
        {"step": step, "layer": layer, "ffn": "ffn", "site": site, "eigenvalues": values}
        for step in STEPS
        for layer in range(8)
        for site, values in (("pre", pre), ("post", post))
    ]
    return pd.DataFrame(rows)


def test_spectra_are_shares_of_the_variance_by_rank(stored):
    """By hand: 8, 4, 2, 2 of 16; eigenvalues of 0 cannot be shown on a logarithmic axis."""
    figure = figures_of_one_run.spectra(stored, measured(8), "t", STEPS)
    assert [panel.get_title() for panel in figure.axes] == [
        f"layer {i}" for i in (0, 1, 3, 4, 6, 7)
    ]
    panel = figure.axes[0]
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    pre, post = panel.lines[0], panel.lines[1]
    np.testing.assert_array_equal(pre.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(pre.get_ydata(), [0.5, 0.25, 0.125, 0.125])
    assert post.get_ydata().sum() == pytest.approx(1)
    assert panel.lines[-1].get_xdata()[0] == 4  # the rank limit
    assert len(panel.lines) == 2 * len(STEPS) + 1
    limits = {(axes.get_xlim(), axes.get_ylim()) for axes in figure.axes}
    assert len(limits) == 1


def test_later_spectra_are_darker_and_sites_keep_their_colors(stored):
    figure = figures_of_one_run.spectra(stored, measured(8), "t", STEPS)
    pre = [line.get_color() for line in figure.axes[0].lines[:-1:2]]
    assert [sum(color) for color in pre] == sorted((sum(color) for color in pre), reverse=True)
    assert pre[-1] == pytest.approx(to_rgb(COLORS["pre"]))
    only = figures_of_one_run.spectra(stored, measured(8), "t", [30])
    assert only.axes[0].lines[0].get_color() == pytest.approx(to_rgb(COLORS["pre"]))


def test_steps_of_spectra():
    stored = list(range(0, 101, 10))
    assert figures_of_one_run.chosen_steps(stored) == [0, 30, 70, 100]
    assert figures_of_one_run.chosen_steps(stored[::-1], (52, 48, 1000)) == [50, 100]
    assert figures_of_one_run.chosen_steps([7]) == [7]


def test_training_curves_and_other_logged_values():
    scalars = pd.DataFrame(
        {
            "step": [4, 9, 4, 9, 0],
            "name": ["train_loss"] * 2 + ["$val_accuracy$"] * 2 + ["val_loss"],
            "value": [4.5, 4.1, 0.5, 0.7, 5.0],
        }
    )
    figure = figures_of_one_run.training(measured(), scalars, 4.9, "t")
    losses, rate, accuracy = figure.axes
    np.testing.assert_array_equal(losses.lines[0].get_ydata(), [4.5, 4.1])
    np.testing.assert_allclose(losses.lines[1].get_ydata(), [5, 5 - 1 / 3, 4])
    assert losses.lines[2].get_ydata()[0] == 4.9
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [0.03, 0.02, 0])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), [0.5, 0.7])
    assert (losses.get_ylabel(), rate.get_ylabel()) == ("loss (nats per target)", "learning rate")
    figure.draw_without_rendering()  # a name with dollars is no formula


def test_without_scalars_the_training_loss_comes_from_the_rows():
    scalars = pd.DataFrame({"step": [], "name": [], "value": []})
    frame = measured()
    frame["train_loss"] = np.where(frame["step"] > 0, 7.0, np.nan)
    figure = figures_of_one_run.training(frame, scalars, None, "t")
    n_steps = frame["step"].nunique()
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [7.0] * (n_steps - 1))
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["training, mean since the last measurement", "validation"]


def test_a_loss_that_was_not_evaluated_at_every_step_is_a_line():
    """Without markers, points with gaps between them would be invisible."""
    frame = measured().assign(train_loss=np.nan)
    frame.loc[frame["step"] == STEPS[1], "val_loss"] = np.nan
    scalars = pd.DataFrame({"step": [], "name": [], "value": []})
    training = figures_of_one_run.training(frame, scalars, None, "t").axes[0].lines[1]
    overview = figures_of_one_run.overview(frame, CORRELATIONS, "run x")
    (twin, *_) = [each for each in overview.axes if each.get_ylabel() == "validation loss (nats)"]
    for line in (training, twin.lines[0]):
        np.testing.assert_array_equal(line.get_xdata(), [STEPS[0], STEPS[2]])


def test_training_without_a_loss_says_so():
    frame = measured().assign(val_loss=np.nan, train_loss=np.nan)
    scalars = pd.DataFrame({"step": [], "name": [], "value": []})
    figure = figures_of_one_run.training(frame, scalars, None, "t")
    assert texts_of(figure) == ["no loss was stored"]
    assert len(figure.axes[0].lines) == 2
