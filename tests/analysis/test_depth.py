"""The depth of layers, and which of them are in the middle third."""

import numpy as np
import pytest

from nerve.analysis.depth import depth_means, metrics_by_depth
from nerve.errors import ConfigError


def layers(n, step=0, ffn="ffn", **values):
    """Layer i has JS i / 16."""
    return [
        {"step": step, "layer": i, "ffn": ffn, "js": i / 16, "val_loss": 5 - step / 10, **values}
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("n", "middle"),
    [
        (1, [0]),
        (2, [0, 1]),
        (3, [1]),
        (4, [1, 2]),
        (5, [2]),
        (6, [2, 3]),
        (12, [4, 5, 6, 7]),
        (24, [8, 9, 10, 11, 12, 13, 14, 15]),
    ],
)
def test_the_middle_third(tables, n, middle):
    """Computed by hand; a third of the layers if their number is divisible by three."""
    rows = metrics_by_depth(*tables({"rows": layers(n)}))
    assert list(rows.loc[rows["middle"], "layer"]) == middle
    assert list(rows["depth"]) == [(i + 0.5) / n for i in range(n)]


def test_depth_refers_to_all_layers_of_the_model_if_only_some_were_measured(tables):
    """monitor.layers=[0,1,2] of six layers: only layer 2 is in the middle third."""
    part = {"rows": layers(3), "config": {"model.n_layers": 6}}
    rows = metrics_by_depth(*tables(part, {"rows": layers(3)}))
    by_run = rows.groupby("run_id", sort=False, observed=True)
    depths = [list(run["depth"]) for _, run in by_run]
    assert depths == [[0.5 / 6, 1.5 / 6, 2.5 / 6], [0.5 / 3, 1.5 / 3, 2.5 / 3]]
    assert [list(run.loc[run["middle"], "layer"]) for _, run in by_run] == [[2], [1]]


def test_an_encoder_and_a_decoder_have_depths_of_their_own(tables):
    """Of a model with 4 and 2 layers, whose `model.n_layers` is that of one of them."""
    rows = [{**row, "ffn": "encoder_ffn"} for row in layers(4)]
    rows += [{**row, "ffn": "decoder_ffn"} for row in layers(2)]
    for n_layers in (4, 2):
        spec = {"run_id": f"of{n_layers}", "rows": rows, "config": {"model.n_layers": n_layers}}
        metrics, runs = tables(spec)
        own = metrics_by_depth(metrics, runs[runs["run_id"] == f"of{n_layers}"])
        depths = own.groupby("ffn", observed=True)["depth"].agg(list)
        assert depths["encoder_ffn"] == [1 / 8, 3 / 8, 5 / 8, 7 / 8]
        assert depths["decoder_ffn"] == [1 / 4, 3 / 4]


def test_one_row_per_layer_with_its_depth(tables):
    metrics, runs = tables(
        {"rows": layers(3), "config": {"ffn.width": "8/3"}}, {"rows": layers(4, step=10)}
    )
    rows = metrics_by_depth(metrics, runs, ["ffn.width"])
    assert len(rows) == 7
    assert list(rows["js"][:3]) == [0, 1 / 16, 2 / 16]
    assert set(rows["pr_gain"]) == {2.5}
    assert set(rows["delta_eee"]) == {-0.5}
    assert set(rows["pr_post_fraction"]) == {0.625}
    assert list(rows["ffn.width"][:4].fillna("none")) == ["8/3"] * 3 + ["none"]
    assert set(rows["flag"]) == {"ok"}
    only = metrics_by_depth(metrics, runs[1:])
    assert list(only["step"]) == [10] * 4


def test_means_over_all_layers_and_the_middle(tables):
    """Layers 0 to 5 with JS 0 to 5/16: 2.5/16 for all and for 2 and 3; with 3 dead, 2/16."""
    dead = {"step": 10, "layer": 3, "js": None, "val_loss": 4, "status": "no variance"}
    later = [row for row in layers(6, step=10) if row["layer"] != 3]
    means = depth_means(*tables({"rows": [*layers(6), *later, dead]}))
    by_key = means.set_index(["step", "region"])
    assert by_key["js"].to_dict() == {
        (0, "all"): 2.5 / 16,
        (0, "middle"): 2.5 / 16,
        (10, "all"): pytest.approx(12 / 5 / 16),
        (10, "middle"): 2 / 16,
    }
    assert by_key["n_layers"].to_dict() == {
        (0, "all"): 6,
        (0, "middle"): 2,
        (10, "all"): 6,
        (10, "middle"): 2,
    }
    assert by_key["n_null"].to_dict() == {
        (0, "all"): 0,
        (0, "middle"): 0,
        (10, "all"): 1,
        (10, "middle"): 1,
    }
    assert by_key.loc[(10, "all"), "val_loss"] == 4


def test_the_two_ffns_of_a_mixer_stay_apart(tables):
    both = [*layers(4, ffn="token_mixing"), *layers(2, ffn="channel_mixing")]
    means = depth_means(*tables({"rows": both})).set_index(["ffn", "region"])["js"] * 16
    assert means.to_dict() == {
        ("token_mixing", "all"): 1.5,
        ("channel_mixing", "all"): 0.5,
        ("token_mixing", "middle"): 1.5,
        ("channel_mixing", "middle"): 0.5,
    }


def test_other_metrics_can_be_named(tables):
    metrics, runs = tables({"rows": layers(3)})
    assert list(depth_means(metrics, runs, names=["se_post"])["se_post"]) == [1.5, 1.5]
    with pytest.raises(ConfigError, match=r"with the column se_pots.*Similar names: se_post"):
        depth_means(metrics, runs, names=["se_pots"])


def test_a_dead_run_has_rows_without_numbers(tables):
    rows = layers(3, js=None, pr_pre=None, status="no variance")
    means = depth_means(*tables({"rows": rows}))
    assert np.isnan(means["js"]).all()
    assert list(means["n_null"]) == [3, 1]
