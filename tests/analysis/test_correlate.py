"""Correlations within and across runs against hand-made series and SciPy, and what they leave
out."""

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from nerve.analysis.compare import average_seeds, final_metrics
from nerve.analysis.correlate import correlate_within_runs
from nerve.analysis.correlate_across import correlate_across_runs
from nerve.errors import ConfigError
from nerve.storage.find import IncompleteWarning

SCHEDULE = {"optimizer.schedule.warmup": 0.1, "trainer.max_steps": 100}


def series(losses, values, name="pr_post", layer=0, every=10, **more):
    """Rows of one layer at steps 0, `every`, …"""
    return [
        {"step": every * i, "layer": layer, "val_loss": loss, name: value, **more}
        for i, (loss, value) in enumerate(zip(losses, values, strict=True))
    ]


def of(frame, metric="pr_post", **values):
    """The rows of a metric, by window."""
    for name, value in (values | {"metric": metric}).items():
        frame = frame[frame[name] == value]
    return frame.set_index("window")


def test_the_three_windows_by_hand(tables):
    """Step 0 is far off and reverses the perfect -1 of all later steps; their changes agree in
    part."""
    losses, values = [9, 5, 4, 2, 1], [-40, 1, 2, 4, 5]
    metrics, runs = tables({"rows": series(losses, values), "config": SCHEDULE})
    windows = of(correlate_within_runs(metrics, runs))
    assert list(windows.index) == ["all", "after_warmup", "differences"]
    assert list(windows["first_step"]) == [0, 10, 10]
    assert list(windows["n"]) == [5, 4, 3]
    assert windows.loc["after_warmup", "pearson"] == pytest.approx(-1)
    assert windows.loc["differences", "pearson"] == pytest.approx(-1)
    expected = scipy.stats.pearsonr(losses, values).statistic
    assert windows.loc["all", "pearson"] == pytest.approx(expected)
    assert list(windows["spearman"]) == pytest.approx([-1, -1, -1])


def test_changes_are_between_steps_with_a_loss(tables):
    """A run that is evaluated at every second step has those of a run that is only measured
    there; an infinite loss has none on either side."""
    losses, prs = [9, 5, 4, 3.5, 3.4, 3.0], [1, 2, 4, 5, 7, 8.0]
    rows = series(losses, prs)
    between = [{**row, "step": row["step"] + 5, "val_loss": None, "pr_post": 99.0} for row in rows]
    infinite = series([*losses[:3], math.inf, *losses[4:]], prs)
    metrics, runs = tables({"rows": rows}, {"rows": [*rows, *between]}, {"rows": infinite})
    found = correlate_within_runs(metrics, runs, names=["pr_post"])
    found = found[found["window"] == "differences"]
    assert found["n"].tolist() == [4, 4, 2]
    assert found["pearson"].iloc[0] == pytest.approx(
        np.corrcoef(np.diff(losses[1:]), np.diff(prs[1:]))[0, 1]
    )
    assert found["pearson"].iloc[1] == found["pearson"].iloc[0]


def test_a_shared_trend_has_no_shared_changes(tables):
    """Loss -1, -2, -1, -2 and metric +1, +1, +2, +2 per step: both drift, but share no change."""
    losses, values = [20, 19, 17, 16, 14], [0, 1, 2, 4, 6]
    metrics, runs = tables(
        {"rows": series([25, *losses], [-1, *values]), "config": SCHEDULE},
    )
    windows = of(correlate_within_runs(metrics, runs))
    assert windows.loc["after_warmup", "pearson"] < -0.97
    assert windows.loc["differences", "pearson"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("config", "first_step"),
    [
        (SCHEDULE, 10),
        ({"optimizer.schedule.warmup": 0.25, "trainer.max_steps": 100}, 25),
        ({"optimizer.schedule.warmup": 0, "trainer.max_steps": 100}, 1),
        ({"optimizer.schedule.warmup": 0.5}, 20),
        ({"trainer.max_steps": 200}, 10),
        ({}, 2),
    ],
)
def test_where_the_warmup_ends(tables, config, first_step):
    """round(warmup · max_steps), at least 1; .05 and the last step, 40, if these are unknown."""
    metrics, runs = tables({"rows": series([5, 4, 3, 2, 1], range(5)), "config": config})
    windows = of(correlate_within_runs(metrics, runs))
    assert windows.loc["after_warmup", "first_step"] == first_step
    assert windows.loc["after_warmup", "n"] == sum(step >= first_step for step in range(0, 50, 10))


def test_layers_can_correlate_where_their_mean_does_not(tables):
    """Two layers that move in opposite directions: -1 and +1, and a constant mean."""
    losses = [5, 4, 3, 2]
    rows = [*series(losses, [1, 2, 3, 4]), *series(losses, [4, 3, 2, 1], layer=1)]
    metrics, runs = tables({"rows": rows})
    layers = of(correlate_within_runs(metrics, runs, by_layer=True)).loc["all"]
    assert list(layers["layer"]) == [0, 1]
    assert list(layers["pearson"]) == pytest.approx([-1, 1])
    mean = of(correlate_within_runs(metrics, runs)).loc["all"]
    assert mean["n"] == 4
    assert np.isnan(mean["pearson"])
    assert np.isnan(mean["spearman"])


def test_many_runs_in_any_order_are_scipys(tables):
    """Six runs of two FFNs and two layers, with shuffled rows and some nulls: each series as in
    SciPy."""
    rng = np.random.default_rng(0)
    names = ["pr_post", "js"]
    specs = []
    for _ in range(6):
        n = int(rng.integers(10, 16))
        losses = rng.normal(size=n)
        rows = [
            {"step": 10 * i, "layer": layer, "ffn": ffn, "val_loss": losses[i]}
            | {name: None if rng.random() < 0.1 else rng.normal() for name in names}
            for i in range(n)
            for layer in range(2)
            for ffn in ("token_mixing", "channel_mixing")
        ]
        specs.append({"rows": rows, "unigram_loss": 99.0})
    metrics, runs = tables(*specs)
    shuffled = metrics.sample(frac=1, random_state=0)
    table = correlate_within_runs(shuffled, runs, by_layer=True, names=names)
    assert len(table) == 6 * 2 * 2 * 2 * 3
    for row in table[table["window"] != "after_warmup"].itertuples():
        own = metrics.query("run_id == @row.run_id and ffn == @row.ffn and layer == @row.layer")
        pairs = own.sort_values("step")[["val_loss", row.metric]]
        if row.window == "differences":
            pairs = pairs.iloc[1:].diff()
        pairs = pairs.dropna()
        assert row.n == len(pairs)
        pearson, spearman = scipy.stats.pearsonr(*pairs.T.values), scipy.stats.spearmanr(pairs)
        assert row.pearson == pytest.approx(pearson.statistic)
        assert row.spearman == pytest.approx(spearman.statistic)


def test_runs_with_too_few_steps_to_correlate_stay_in_the_table(tables):
    """Two steps, dead layers, no loss: rows with n and without coefficients; the flag says
    which."""
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables(
            {"rows": series([8, 5], [1, 2])},
            {"rows": series([8, 5, 4], [None] * 3, status="no variance")},
            {"rows": series([None] * 3, [1, 2, 3])},
            {"rows": series([8, 9, 9], [1, 2, 4])},
            {"rows": []},
        )
    rows = of(correlate_within_runs(metrics, runs)).loc["all"]
    assert list(rows["run_id"]) == ["run0", "run1", "run2", "run3"]
    assert list(rows["flag"]) == ["ok", "ok", "no loss", "untrained"]
    assert list(rows["n"]) == [2, 0, 0, 3]
    assert rows["pearson"].isna().tolist() == [True, True, True, False]


def test_no_rows_give_no_rows(tables):
    metrics, runs = tables({"rows": series([8, 5], [1, 2])})
    assert len(correlate_within_runs(metrics[:0], runs)) == 0
    assert len(correlate_within_runs(metrics, runs[:0])) == 0


def test_null_models_in_each_window_are_scipys(tables):
    """Loss and metric follow a clock and the learning rate, with noise: r of each, and partial
    r."""
    rng = np.random.default_rng(5)
    steps = np.arange(0, 210, 10)
    clock, rates = np.log1p(steps), 0.01 * (1 - (steps / 200) ** 2)
    losses = 7 - clock / 2 + rng.normal(size=21) / 20
    values = 3 + clock + rng.normal(size=21) / 20
    rows = series(losses, values)
    metrics, runs = tables(
        {
            "rows": [row | {"lr": rate} for row, rate in zip(rows, rates, strict=True)],
            "config": {"optimizer.schedule.warmup": 0.1, "trainer.max_steps": 200},
        }
    )
    windows = of(correlate_within_runs(metrics, runs))
    assert windows.loc["after_warmup", "pearson"] < -0.95
    late = slice(2, None)
    for null, own in (("clock", clock), ("lr", rates)):
        taken = {
            "all": (values, losses, own),
            "after_warmup": (values[late], losses[late], own[late]),
            "differences": tuple(np.diff(series[late]) for series in (values, losses, own)),
        }
        for window, (x, y, z) in taken.items():
            row = windows.loc[window]
            xy, xz, yz = (scipy.stats.pearsonr(*p).statistic for p in ((x, y), (x, z), (y, z)))
            assert row[f"r_{null}"] == pytest.approx(yz)
            expected = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
            assert row[f"given_{null}"] == pytest.approx(expected)
    row = windows.loc["after_warmup"]
    assert row["given_clock_low"] < 0 < row["given_clock_high"]


def test_a_constant_rate_is_no_null_model(tables):
    losses, values = np.random.default_rng(6).random((2, 20))
    metrics, runs = tables({"rows": series(losses, values)})
    windows = of(correlate_within_runs(metrics, runs))
    assert windows[["r_lr", "given_lr", "given_lr_low"]].isna().all(axis=None)
    assert windows[["r_clock", "given_clock", "given_clock_low"]].notna().all(axis=None)


def test_varied_factors_are_null_models_across_runs(tables):
    """Both follow the width of 9 designs with two seeds (one width is a fraction), and nothing
    else."""
    rng = np.random.default_rng(7)
    widths = [1, 2, 3, 4, 5, 6, 7, 8, "26/3"]
    numbers = np.repeat([*range(1, 9), 26 / 3], 2)
    losses, values = 6 - numbers / 3 + rng.normal(size=18) / 9, numbers + rng.normal(size=18) / 3
    metrics, runs = tables(
        *(
            {
                "rows": [{"step": 10 + i % 3, "val_loss": losses[i], "pr_post": values[i]}],
                "config": {"ffn.width": widths[i // 2]},
                "seed": i % 2,
            }
            for i in range(18)
        )
    )
    points = final_metrics(metrics, runs, ["ffn.width"])
    (row,) = correlate_across_runs(points, given=["ffn.width"], names=["pr_post"]).to_dict(
        "records"
    )
    of_width = scipy.stats.pearsonr(numbers, losses).statistic
    assert row["r_ffn.width"] == pytest.approx(of_width)
    xy, xz = (scipy.stats.pearsonr(values, other).statistic for other in (losses, numbers))
    expected = (xy - xz * of_width) / np.sqrt((1 - xz**2) * (1 - of_width**2))
    assert row["pearson"] < -0.9
    assert row["given_ffn.width"] == pytest.approx(expected)
    assert row["given_ffn.width_low"] < 0 < row["given_ffn.width_high"]
    clock = np.log1p([10 + i % 3 for i in range(18)])
    assert row["r_clock"] == pytest.approx(scipy.stats.pearsonr(clock, losses).statistic)


def test_a_factor_of_names_cannot_be_controlled_for(tables):
    spec = {"rows": [{"step": 10, "val_loss": 3}], "config": {"activation.name": "gelu"}}
    points = final_metrics(*tables(spec), ["activation.name"])
    with pytest.raises(ConfigError, match=r"has 'gelu'.*by=\['activation.name'\]"):
        correlate_across_runs(points, given=["activation.name"])


def points_of(tables, pairs, **more):
    """Runs that end at the given losses with the given PR_post."""
    specs = [
        {"rows": [{"step": 10, "val_loss": loss, "pr_post": value}], "unigram_loss": 7.0} | more
        for loss, value in pairs
    ]
    return final_metrics(*tables(*specs), ["seed"])


def one(frame, metric="pr_post"):
    (row,) = frame[frame["metric"] == metric].itertuples()
    return row


def test_across_runs_is_scipys(tables):
    pairs = [(5, 1), (4, 3), (3, 2), (2, 6), (1, 5)]
    row = one(correlate_across_runs(points_of(tables, pairs)))
    losses, values = np.transpose(pairs)
    expected = scipy.stats.pearsonr(losses, values)
    assert (row.n, row.n_flagged, row.n_missing, row.n_heldout) == (5, 0, 0, 0)
    assert row.pearson == pytest.approx(expected.statistic)
    interval = expected.confidence_interval(0.95)
    assert (row.pearson_low, row.pearson_high) == pytest.approx(tuple(interval))
    assert row.spearman == pytest.approx(scipy.stats.spearmanr(losses, values).statistic)
    assert row.spearman_low < row.spearman < row.spearman_high


def test_flagged_runs_are_counted_and_left_out_unless_asked_for(tables):
    """The loss 9 is above the unigram loss and would reverse the correlation."""
    points = points_of(tables, [(5, 1), (4, 2), (3, 3), (9, 99)])
    row = one(correlate_across_runs(points))
    assert (row.n, row.n_flagged) == (3, 1)
    assert row.pearson == pytest.approx(-1)
    row = one(correlate_across_runs(points, flagged=True))
    assert (row.n, row.n_flagged) == (4, 1)
    assert row.pearson > 0.9


def test_dead_metrics_are_counted_as_missing(tables):
    row = one(correlate_across_runs(points_of(tables, [(5, 1), (4, None), (3, 3), (2, 4)])))
    assert (row.n, row.n_missing) == (3, 1)


def test_groups_by_factors_of_any_kind(tables):
    """A missing value is a group, and so are 4 and "8/3"; each has its own runs."""
    specs = [
        {
            "rows": [{"step": 10, "val_loss": loss, "pr_post": sign * loss}],
            "config": {} if width is None else {"ffn.width": width},
        }
        for width, sign in ((4, 1), ("8/3", -1), (None, 1))
        for loss in (3, 2, 1)
    ]
    points = final_metrics(*tables(*specs), ["ffn.width"])
    rows = correlate_across_runs(points, ["ffn.width"], names=["pr_post"])
    assert list(rows["ffn.width"][:2]) == [4, "8/3"]
    assert pd.isna(rows["ffn.width"][2])
    assert list(rows["n"]) == [3, 3, 3]
    assert list(rows["pearson"]) == pytest.approx([1, -1, 1])


def test_a_run_without_metrics_counts_in_its_groups(tables):
    """It has no FFN: it counts in both groups of a Mixer, and separately if there is no other
    group."""
    with pytest.warns(IncompleteWarning):
        metrics, runs = tables(
            {
                "rows": [
                    {"step": 10, "val_loss": 3, "ffn": ffn}
                    for ffn in ("token_mixing", "channel_mixing")
                ],
                "config": {"ffn.width": 2},
            },
            {"rows": [], "config": {"ffn.width": 2}},
            {"rows": [], "config": {"ffn.width": 4}, "run_status": "failed"},
        )
    points = final_metrics(metrics, runs, ["ffn.width"])
    rows = correlate_across_runs(points, ["ffn.width"], names=["js"])
    assert list(rows["ffn.width"]) == [2, 2, 4]
    assert list(rows["ffn"][:2]) == ["token_mixing", "channel_mixing"]
    assert pd.isna(rows["ffn"][2])
    assert list(rows["n"]) == [1, 1, 0]
    assert list(rows["n_flagged"]) == [1, 1, 1]


def test_different_data_are_never_pooled_and_held_out_sets_are_counted(tables):
    specs = [
        {
            "rows": [{"step": 10, "val_loss": loss, "pr_post": loss}],
            "fingerprints": {"corpus": corpus, "heldout": f"{corpus}{loss % 2}"},
        }
        for corpus in "ab"
        for loss in (1, 2, 3)
    ]
    with pytest.warns(UserWarning, match="fingerprints"):
        metrics, runs = tables(*specs)
    rows = correlate_across_runs(final_metrics(metrics, runs), names=["pr_post"])
    assert rows["data"].nunique() == 2
    assert list(rows["n"]) == [3, 3]
    assert list(rows["n_heldout"]) == [2, 2]


def test_seeds_as_points_or_designs(tables):
    specs = [
        {
            "rows": [{"step": 10, "val_loss": loss + seed / 10, "pr_post": -loss}],
            "config": {"ffn.width": loss},
            "seed": seed,
        }
        for loss in (1, 2, 3, 4)
        for seed in (0, 1)
    ]
    points = final_metrics(*tables(*specs))
    assert one(correlate_across_runs(points)).n == 8
    designs = one(correlate_across_runs(average_seeds(points)))
    assert designs.n == 4
    assert designs.pearson == pytest.approx(-1)


def test_another_target(tables):
    """An accuracy stored at the end of the run, which one run does not have."""
    specs = [
        {
            "rows": [{"step": 10, "val_loss": 1, "pr_post": value}],
            "final": {} if accuracy is None else {"val_accuracy": accuracy},
        }
        for value, accuracy in ((1, 0.2), (2, 0.4), (3, 0.6), (4, None))
    ]
    points = final_metrics(*tables(*specs), ["final.val_accuracy"])
    row = one(correlate_across_runs(points, against="final.val_accuracy"))
    assert (row.n, row.n_missing) == (3, 1)
    assert row.pearson == pytest.approx(1)
    with pytest.raises(ConfigError, match=r"Similar names: .*final\.val_accuracy"):
        correlate_across_runs(points, against="final.accuracy")


def test_without_a_limit_of_steps_the_warmup_is_a_share_of_the_measured_ones(tables):
    rows = [{"step": step, "val_loss": 6 - step / 1000} for step in range(0, 1001, 100)]
    metrics, runs = tables({"rows": rows, "config": {"trainer.max_steps": -1}})
    table = correlate_within_runs(metrics, runs, names=["js"]).set_index("window")
    assert table["first_step"].to_dict() == {"all": 0, "after_warmup": 50, "differences": 50}
