"""One row per run: its last step, the step that reaches a loss, and the mean over its seeds."""

import math

import numpy as np
import pytest

from nerve.analysis.compare import average_seeds, final_metrics, last_crossing, metrics_at_loss
from nerve.errors import ConfigError
from nerve.storage.find import IncompleteWarning


def rows(*losses, ffn="ffn", pr_post=(5.0, 7.0)):
    """Steps 0, 10, 20, …, two layers; PR_post falls by 1 per step."""
    return [
        {"step": 10 * i, "layer": layer, "ffn": ffn, "val_loss": loss, "pr_post": pr - i}
        for i, loss in enumerate(losses)
        for layer, pr in enumerate(pr_post)
    ]


def test_the_last_step_of_each_run(tables):
    """Means over layers computed by hand; runs in their order, with the requested factors."""
    metrics, runs = tables(
        {"rows": rows(8, 6, 5), "seed": 4, "config": {"activation.name": "gelu"}},
        {"rows": rows(8, 6), "seed": 0, "config": {"activation.name": "relu"}},
    )
    points = final_metrics(metrics, runs, ["activation.name", "seed"])
    assert list(points["run_id"]) == ["run0", "run1"]
    assert list(points["activation.name"]) == ["gelu", "relu"]
    assert list(points["seed"]) == [4, 0]
    assert list(points["step"]) == [20, 10]
    assert list(points["tokens_seen"]) == [1280, 640]
    assert list(points["val_loss"]) == [5, 6]
    assert list(points["pr_post"]) == [4, 5]
    assert list(points["pr_gain"]) == [2, 2.5]
    assert list(points["n_layers"]) == [2, 2]
    assert points["exp_se_pre"][0] == pytest.approx(np.e)
    assert points.columns.is_unique


def test_the_mean_of_exp_is_not_the_exp_of_the_mean(tables):
    layers = [{"step": 0, "layer": i, "se_pre": se, "val_loss": 5} for i, se in enumerate((0, 2))]
    points = final_metrics(*tables({"rows": layers}))
    assert points["exp_se_pre"][0] == pytest.approx((1 + np.e**2) / 2)


def test_a_mixer_has_two_rows(tables):
    both = [*rows(8, 5, ffn="token_mixing"), *rows(8, 5, ffn="channel_mixing", pr_post=(3, 3))]
    points = final_metrics(*tables({"rows": both})).set_index("ffn")
    assert points["pr_post"].to_dict() == {"token_mixing": 5, "channel_mixing": 2}


def test_dead_layers_are_counted_and_not_averaged(tables):
    dead = dict.fromkeys(["pr_pre", "pr_post"]) | {"status": "no variance", "val_loss": 5}
    one = [{"step": 0, "layer": 0, "pr_post": 3.0, "val_loss": 5}, {"step": 0, "layer": 1, **dead}]
    all_dead = [{"step": 0, "layer": layer, **dead} for layer in range(2)]
    points = final_metrics(*tables({"rows": one}, {"rows": all_dead}))
    assert list(points["n_null"]) == [1, 2]
    assert list(points["n_layers"]) == [2, 2]
    assert points["pr_post"][0] == 3
    assert np.isnan(points["pr_post"][1])


def test_flagged_runs_are_included_with_their_flag(tables):
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables(
            {"rows": rows(8, 5)},
            {"rows": rows(8, 7.5)},
            {"rows": [], "run_status": "failed"},
            {"rows": rows(8), "run_status": "interrupted"},
        )
    points = final_metrics(metrics, runs)
    assert list(points["flag"]) == ["ok", "untrained", "failed", "interrupted"]
    assert points["ffn"].isna().tolist() == [False, False, True, False]
    assert points["step"].isna().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("factor", "message"),
    [("activation.nam", r"Similar names: activation\.name"), ("step", "already have; got step")],
)
def test_an_unusable_factor_is_refused(tables, factor, message):
    metrics, runs = tables({"rows": rows(8, 5), "config": {"activation.name": "gelu"}})
    with pytest.raises(ConfigError, match=message):
        final_metrics(metrics, runs, [factor])


def test_crossings_of_a_loss_by_hand(tables):
    """From 6.5 to 4, it crosses 5 for the last time after three fifths of the way; one run reaches
    it at its end, one never does, and one was below before it was measured."""
    points = metrics_at_loss(
        *tables(
            {"rows": rows(8, 6, 4.5, 6.5, 4)},
            {"rows": rows(8, 5)},
            {"rows": rows(8, 6, 5.5)},
            {"rows": rows(4.5, 4)},
        ),
        loss=5,
    )
    assert list(points["target_loss"]) == [5, 5, 5, 5]
    assert list(points["reached"]) == [True, True, False, False]
    assert list(points["step"][:2]) == [36, 10]
    assert list(points["tokens_seen"][:2]) == [36 * 64, 640]
    assert list(points["val_loss"][:2]) == [5, 5]
    assert list(points["pr_post"][:2]) == [pytest.approx(2.4), 5]
    assert points[["step", "val_loss", "pr_post"]][2:].isna().all(axis=None)
    assert points["ffn"][2] == "ffn"


def test_equal_loss_does_not_depend_on_how_often_a_run_was_measured(tables):
    """Two runs on one line, measured every 10 and every 30 steps: the same point at loss 5.25."""
    losses = [8 - 0.5 * i for i in range(7)]
    often = rows(*losses)
    seldom = [row for row in often if row["step"] % 30 == 0]
    points = metrics_at_loss(*tables({"rows": often}, {"rows": seldom}), loss=5.25)
    for name in ("step", "tokens_seen", "val_loss", "pr_post"):
        assert points[name][0] == pytest.approx(points[name][1])
    assert points["step"][0] == pytest.approx(55)


def test_dead_layers_on_either_side_are_counted(tables):
    """One of two layers is dead at the step below the target, none at the step above."""
    both = rows(8, 4)
    both[-1] |= {"pr_post": None, "status": "no variance"}
    (point,) = metrics_at_loss(*tables({"rows": both}), loss=5).itertuples()
    assert (point.n_layers, point.n_null) == (2, 1)
    assert point.pr_post == pytest.approx(6 + 0.75 * (4 - 6))


def test_the_highest_final_loss_is_the_default(tables):
    """Among runs on the same data; flagged runs do not determine it, but may reach it."""
    there, elsewhere = {"corpus": "a"}, {"corpus": "b"}
    with pytest.warns(UserWarning, match="fingerprints"):
        metrics, runs = tables(
            {"rows": rows(8, 4, 3), "fingerprints": there},
            {"rows": rows(8, 6, 5), "fingerprints": there},
            {"rows": rows(8, 7.5), "fingerprints": there},
            {"rows": rows(8, 4.5), "fingerprints": there, "run_status": "interrupted"},
            {"rows": rows(6, 2), "fingerprints": elsewhere},
        )
    points = metrics_at_loss(metrics, runs)
    assert list(points["target_loss"]) == [5, 5, 5, 5, 2]
    assert list(points["reached"]) == [True, True, False, True, True]
    assert list(points["val_loss"].dropna()) == [5, 5, 5, 2]
    assert list(points["step"].dropna()) == pytest.approx([7.5, 20, 10 * 3 / 3.5, 10])


def test_no_common_loss_where_all_are_flagged(tables):
    points = metrics_at_loss(*tables({"rows": rows(8, 5), "run_status": "running"}))
    assert points["target_loss"].isna().all()
    assert not points["reached"].any()


def test_a_target_is_finite(tables):
    with pytest.raises(ConfigError, match="finite number; got nan"):
        metrics_at_loss(*tables({"rows": rows(8, 5)}), loss=float("nan"))


def test_seeds_are_averaged_and_designs_kept_apart(tables):
    """Losses 5 and 6: mean 5.5, SD .7071; a single seed has a mean and no SD."""
    gelu, relu = {"activation.name": "gelu"}, {"activation.name": "relu"}
    metrics, runs = tables(
        {"rows": rows(8, 5), "seed": 0, "config": gelu, "final": {"val_accuracy": 0.5}},
        {"rows": rows(8, 4), "seed": 0, "config": relu, "final": {"val_accuracy": 0.75}},
        {"rows": rows(8, 6, 6), "seed": 1, "config": gelu, "final": {"val_accuracy": 0.7}},
    )
    factors = ["activation.name", "final.val_accuracy"]
    designs = average_seeds(final_metrics(metrics, runs, factors))
    assert list(designs["activation.name"]) == ["gelu", "relu"]
    assert list(designs["n_seeds"]) == [2, 1]
    assert list(designs["val_loss"]) == [5.5, 4]
    assert designs["val_loss_sd"][0] == pytest.approx(0.5**0.5)
    assert np.isnan(designs["val_loss_sd"][1])
    assert list(designs["pr_post"]) == [4.5, 5]
    assert list(designs["step"]) == [15, 10]
    assert list(designs["n_layers"]) == [4, 2]
    assert list(designs["final.val_accuracy"]) == [pytest.approx(0.6), 0.75]
    assert designs["final.val_accuracy_sd"][0] == pytest.approx(0.02**0.5)
    assert list(designs["flag"]) == ["ok", "ok"]
    assert not {"run_id", "config_id", "seed"} & set(designs.columns)


def test_flagged_seeds_are_counted_and_left_out(tables):
    """Also one without metrics; a design with only flagged runs remains, with missing means."""
    a, b = {"ffn.width": 2}, {"ffn.width": 4}
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables(
            {"rows": rows(8, 7.5), "seed": 0, "config": a},
            {"rows": rows(8, 5), "seed": 1, "config": a},
            {"rows": [], "seed": 2, "config": a, "run_status": "failed"},
            {"rows": rows(8, 7.5), "seed": 0, "config": b},
        )
    designs = average_seeds(final_metrics(metrics, runs, ["ffn.width"]))
    assert list(designs["ffn.width"]) == [2, 4]
    assert list(designs["flag"]) == ["ok", "untrained"]
    assert list(designs["n_seeds"]) == [1, 0]
    assert list(designs["n_flagged"]) == [2, 1]
    assert designs["val_loss"][0] == 5
    assert np.isnan(designs["val_loss"][1])


def test_factors_that_differ_between_seeds(tables):
    """A string that differs is missing, because it belongs to no design."""
    metrics, runs = tables(
        {"rows": rows(8, 5), "seed": 0, "host": "a"}, {"rows": rows(8, 5), "seed": 1, "host": "b"}
    )
    assert average_seeds(final_metrics(metrics, runs, ["host"]))["host"].isna().all()


def test_averages_are_not_averaged_again(tables):
    designs = average_seeds(final_metrics(*tables({"rows": rows(8, 5)})))
    with pytest.raises(ConfigError, match="rows of final_metrics with the column run_id"):
        average_seeds(designs)


def test_how_many_seeds_reached_a_loss(tables):
    metrics, runs = tables(
        {"rows": rows(8, 5, 4), "seed": 0},
        {"rows": rows(8, 6), "seed": 1},
        {"rows": rows(8, 4, 3), "seed": 2},
    )
    (design,) = average_seeds(metrics_at_loss(metrics, runs, loss=5)).itertuples()
    assert design.reached == pytest.approx(2 / 3)
    assert design.n_seeds == 3
    assert design.val_loss == 5
    assert design.step == pytest.approx((10 + 7.5) / 2)


def test_a_flagged_run_does_not_describe_a_design_with_other_runs(tables):
    """The final accuracy of a failed run is not that of the design."""
    rows = [{"step": 0, "val_loss": 6.0}, {"step": 10, "val_loss": 3.0}]
    config = {"activation.name": "gelu"}
    metrics, runs = tables(
        {"rows": rows, "config": config, "run_status": "failed", "final": {"accuracy": 0.5}},
        {"rows": rows, "config": config},
        {"rows": rows, "config": config},
    )
    (design,) = average_seeds(final_metrics(metrics, runs, ["final.accuracy"])).to_dict("records")
    assert (design["n_seeds"], design["n_flagged"]) == (2, 1)
    assert math.isnan(design["final.accuracy"])


def test_a_step_exactly_at_the_target_needs_no_step_before_it():
    """There, the metric may be missing."""
    crossing = last_crossing(np.array([3.0, 2.0, 1.0]), 2.0)
    assert crossing.interpolate(np.array([np.nan, 5.0, 6.0])) == 5.0
