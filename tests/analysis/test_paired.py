"""Differences of designs paired by seed, against SciPy and by hand, and over which runs the error
is pooled."""

import numpy as np
import pytest
from scipy import stats

from nerve.analysis.compare import final_metrics, metrics_at_loss
from nerve.analysis.factors import level_text
from nerve.analysis.paired import compare_seeds
from nerve.errors import ConfigError

RNG = np.random.default_rng(0)


def specs(losses, pr_post=None, **config):
    """Seeds 0, 1, … of one design, with these final losses."""
    pr_post = pr_post or [5.0] * len(losses)
    return [
        {
            "rows": [
                {"step": 0, "val_loss": 6.5, "pr_post": 1.0},
                {"step": 10, "val_loss": loss, "pr_post": value},
            ],
            "seed": seed,
            "config": {name.replace("__", "."): value for name, value in config.items()},
        }
        for seed, (loss, value) in enumerate(zip(losses, pr_post, strict=True))
    ]


def compared(tables, designs, factor, names=("val_loss",)):
    spec = [dict(one, run_id=f"r{i}") for i, one in enumerate(s for d in designs for s in d)]
    metrics, runs = tables(*spec)
    points = final_metrics(metrics, runs)
    return compare_seeds(points, runs, factor, names=names)


def test_two_designs_are_scipys_paired_t(tables):
    gelu, relu = [5.0, 4.0, 4.5, 4.2], [5.2, 4.1, 4.4, 4.5]
    designs = [specs(gelu, activation__name="gelu"), specs(relu, activation__name="relu")]
    (row,) = compared(tables, designs, "activation.name").itertuples()
    expected = stats.ttest_rel(relu, gelu)
    assert (row.level, row.other, row.where, row.unit) == ("relu", "gelu", "", "")
    assert (row.n_pairs, row.n_higher, row.df, row.n_designs) == (4, 3, 3, 2)
    assert row.difference == pytest.approx(np.mean(relu) - np.mean(gelu))
    assert (row.low, row.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert row.outcome == "within noise"


def test_two_seeds_of_two_designs_alone_decide_nothing(tables):
    """However far apart they are: there is only one degree of freedom."""
    noise = iter(RNG.normal(size=16) / 100)
    two = [
        specs([4 + drop + next(noise), 4.2 + drop + next(noise)], activation__name=name)
        for name, drop in (("gelu", 0.0), ("relu", 0.5))
    ]
    alone = compared(tables, two, "activation.name").iloc[0]
    assert (alone["df"], alone["outcome"]) == (1, "undecided")


def test_the_error_is_pooled_over_the_designs_of_one_scale(tables):
    """Designs of another d_model, or of other data, have their own error."""
    noise = iter(RNG.normal(size=32) / 100)
    designs = [
        specs(
            [scale * next(noise) + drop + 4 + seed / 5 for seed in range(2)],
            activation__name=name,
            ffn__width=width,
            model__d_model=d_model,
        )
        for d_model, scale in ((64, 1), (128, 10))
        for width in (1, 2, 4, 8)
        for name, drop in (("gelu", 0.0), ("relu", 0.5))
    ]
    table = compared(tables, designs, "activation.name")
    assert len(table) == 8  # a pair at each width and d_model
    assert (table["df"] == 7).all()  # (8 designs - 1)(2 seeds - 1)
    assert (table["n_designs"] == 8).all()
    small = table["where"].str.contains("model.d_model=64")
    assert table.loc[small, "sd"].nunique() == 1
    assert table.loc[small, "sd"].iloc[0] < 0.03 < table.loc[~small, "sd"].iloc[0]
    assert (table.loc[small, "outcome"] == "higher").all()
    losses = np.array([[each["rows"][1]["val_loss"] for each in own] for own in designs[:8]])
    rest = losses - losses.mean(0) - losses.mean(1, keepdims=True) + losses.mean()
    assert table.loc[small, "sd"].iloc[0] == pytest.approx(np.sqrt((rest**2).sum() / 7))


@pytest.mark.parametrize("name", ["model__d_model", "trainer__max_steps", "data__batch_size"])
def test_what_distinguishes_scales_can_be_the_factor_itself(tables, name):
    """By SciPy; scales that differ in something else are still apart."""
    small, large = [5.0, 4.0, 4.5, 4.2], [4.2, 3.9, 3.4, 4.0]
    other = {"model__n_layers": 4}
    designs = [
        specs(small, **{name: 64}, model__n_layers=2),
        specs(large, **{name: 128}, model__n_layers=2),
        specs([1.0, 2.0, 1.5, 1.2], **{name: 64}, **other),
        specs([1.0, 1.9, 1.4, 1.0], **{name: 128}, **other),
    ]
    table = compared(tables, designs, name.replace("__", "."))
    assert list(table["where"]) == ["model.n_layers=2", "model.n_layers=4"]
    row, expected = table.iloc[0], stats.ttest_rel(large, small)
    assert (row["level"], row["other"], row["n_designs"], row["df"]) == ("128", "64", 2, 3)
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_what_follows_the_factor_does_not_distinguish_scales(tables):
    """Models of two sizes, whose width follows their depth, as in presets; by SciPy."""
    small, large = [5.0, 4.0, 4.5, 4.2], [4.2, 3.9, 3.4, 4.0]
    designs = [
        specs(small, model__n_layers=2, model__d_model=64, data__batch_size=8),
        specs(large, model__n_layers=4, model__d_model=128, data__batch_size=16),
    ]
    (row,) = compared(tables, designs, "model.n_layers").itertuples()
    expected = stats.ttest_rel(large, small)
    assert (row.level, row.other, row.where, row.n_pairs, row.df) == ("4", "2", "", 4, 3)
    assert (row.low, row.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_only_designs_that_differ_in_the_factor_alone_and_share_a_seed(tables):
    """GELU at width 1, ReLU at 2: no pair. At width 4 there is one; SiLU has another seed."""
    silu = [dict(specs([4.4], activation__name="silu", ffn__width=4)[0], seed=7)]
    designs = [
        specs([4.0, 4.1], activation__name="gelu", ffn__width=1),
        specs([4.2, 4.3], activation__name="relu", ffn__width=2),
        specs([4.0, 4.1], activation__name="gelu", ffn__width=4),
        specs([4.2, 4.3], activation__name="relu", ffn__width=4),
        silu,
    ]
    (row,) = compared(tables, designs, "activation.name").itertuples()
    assert (row.level, row.other, row.where) == ("relu", "gelu", "ffn.width=4")


def test_levels_in_their_order_and_ratios_as_logarithms(tables):
    """PR_post doubles with the width: a difference of ln 2 at any width."""
    pr = {width: [width * 10.0, width * 11.0] for width in (1, 2, 4)}
    designs = [specs([4.0, 4.1], pr[width], ffn__width=width) for width in (4, 1, 2)]
    table = compared(tables, designs, "ffn.width", names=["pr_post", "val_loss"])
    own = table[table["metric"] == "pr_post"]
    assert list(zip(own["level"], own["other"], strict=True)) == [
        ("2", "1"),
        ("4", "1"),
        ("4", "2"),
    ]
    assert list(own["difference"]) == pytest.approx(np.log([2, 4, 2]))
    assert set(own["unit"]) == {"nats"}
    assert list(table.loc[table["metric"] == "val_loss", "difference"]) == pytest.approx([0] * 3)


def test_at_equal_loss_the_difference_is_that_of_the_interpolated_values(tables):
    designs = [
        specs([4.5, 4.5], [3.0, 3.0], activation__name="gelu"),
        specs([2.5, 2.5], [9.0, 9.0], activation__name="relu"),
    ]
    spec = [dict(one, run_id=f"r{i}") for i, one in enumerate(s for d in designs for s in d)]
    metrics, runs = tables(*spec)
    table = compare_seeds(
        metrics_at_loss(metrics, runs), runs, "activation.name", names=["pr_post"]
    )
    assert table["difference"][0] == pytest.approx(np.log(5 / 3))  # half of the way from 1 to 9


def test_a_factor_that_does_not_vary_or_follows_another_is_refused(tables):
    designs = [
        specs([4.0], activation__name="gelu", activation__slope=0.0, ffn__width=4),
        specs([4.2], activation__name="relu", activation__slope=0.1, ffn__width=4),
    ]
    metrics, runs = tables(*(dict(one[0], run_id=f"r{i}") for i, one in enumerate(designs)))
    points = final_metrics(metrics, runs)
    with pytest.raises(ConfigError, match=r"ffn\.width has one level"):
        compare_seeds(points, runs, "ffn.width")
    with pytest.raises(ConfigError, match=r"activation\.slope is confounded with activation\.name"):
        compare_seeds(points, runs, "activation.slope")


def test_runs_none_of_which_can_be_compared_are_refused_with_their_flags(tables):
    """Not as if the factor had one level."""
    risen = {name: specs([7.0], activation__name=name)[0] for name in ("gelu", "relu")}
    metrics, runs = tables(*(dict(spec, run_id=name) for name, spec in risen.items()))
    points = final_metrics(metrics, runs)
    assert set(points["flag"]) == {"diverged"}
    with pytest.raises(ConfigError, match=r"there are none \(diverged: 2\)"):
        compare_seeds(points, runs, "activation.name")


def test_designs_without_a_seed_in_common_have_no_row(tables):
    apart = specs([4.2, 4.1], activation__name="relu")
    for spec in apart:
        spec["seed"] += 10
    designs = [specs([4.0, 4.3], activation__name="gelu"), apart]
    assert compared(tables, designs, "activation.name").empty


def test_a_metric_without_pairs_does_not_remove_the_rows_of_others(tables):
    designs = [
        specs([4.0, 4.3], [5.0, np.nan], activation__name="gelu"),
        specs([4.2, 4.1], [np.nan, 5.0], activation__name="relu"),
    ]
    table = compared(tables, designs, "activation.name", ["pr_post", "val_loss"])
    assert table["metric"].tolist() == ["val_loss"]


def test_designs_that_also_differ_in_a_key_with_the_name_of_a_result_are_not_paired(tables):
    """A flat configuration: `lr` is a column of the metrics, too. Four designs are two pairs."""
    designs = [
        specs([2 + width + lr, 3 + width + lr], o__width=width, lr=lr)
        for width in (1, 2)
        for lr in (0.1, 0.2)
    ]
    table = compared(tables, designs, "o.width")
    assert list(table["where"]) == ["lr=0.1", "lr=0.2"]
    assert list(table["difference"]) == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("values", [(True, 1), (False, 0), (1, "1"), (True, "true")])
def test_designs_whose_values_only_look_alike_are_not_paired(tables, values):
    """Two designs that differ in both factors, and two that differ in one."""
    designs = [
        specs([2.0 + width, 3.0 + width], a__width=width, a__other=other)
        for width, other in ((1, values[0]), (2, values[1]), (2, values[0]))
    ]
    (row,) = compared(tables, designs, "a.width").itertuples()
    assert row.where == f"a.other={level_text(values[0])}"
    assert (row.n_pairs, row.difference) == (2, pytest.approx(1.0))


@pytest.mark.parametrize("first", [2**53, 2**63, 2**100])
def test_large_seeds_pair_like_small_ones_also_beside_a_run_without_a_seed(tables, first):
    """As floats, neighbors would be one seed; seeds of 128 bits do not fit into any NumPy type."""
    losses = {4: [3.0, 3.2, 3.1], 8: [2.9, 3.0, 3.0]}
    runs = [
        {"run_id": f"{width}-{seed}", "seed": first + seed, "config": {"ffn.width": width}}
        | {"rows": [{"step": 0, "val_loss": 6.0}, {"step": 1, "val_loss": loss}]}
        for width, of_width in losses.items()
        for seed, loss in enumerate(of_width)
    ]
    metrics, loaded = tables(*runs, runs[0] | {"run_id": "x", "seed": None})
    points = final_metrics(metrics, loaded)
    (row,) = compare_seeds(points, loaded, "ffn.width", names=["val_loss"]).to_dict("records")
    assert (row["n_pairs"], row["n_designs"]) == (3, 2)
    paired = stats.ttest_rel(losses[8], losses[4]).confidence_interval()
    assert [row["low"], row["high"]] == pytest.approx([*paired])
