"""Helpers of the comparisons: required columns, runs of rows, groups of points."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

import nerve
from nerve.analysis.frames import (
    average_layers,
    count_distinct,
    group_points,
    interleave,
    join_runs,
    number_rows,
    require_columns,
    require_factors,
)
from nerve.errors import ConfigError


def test_the_error_for_a_missing_column_suggests_similar_names():
    frame = pd.DataFrame({"pr_pre": [1.0], "pr_post": [2.0]})
    require_columns(frame, ["pr_pre"], "load_metrics")
    with pytest.raises(
        ConfigError, match=r"the column pr_pots; .* Similar names: pr_post, pr_pre\."
    ):
        require_columns(frame, ["pr_pre", "pr_pots"], "load_metrics")
    with pytest.raises(ConfigError, match="Similar names: none"):
        require_columns(frame, ["zzz"], "load_metrics")


def test_a_factor_must_not_take_the_name_of_a_result():
    runs = pd.DataFrame({"step": [1], "ffn.width": [4]})
    require_factors(["ffn.width"], runs, ["step"])
    with pytest.raises(ConfigError, match="already have; got step"):
        require_factors(["ffn.width", "step"], runs, ["step"])


def test_rows_are_joined_with_the_description_of_their_runs():
    rows = pd.DataFrame({"run_id": ["b", "x", "a", "b"], "n": [1, 2, 3, 4]}, index=[7, 7, 8, 9])
    described = pd.DataFrame({"run_id": ["a", "b"], "flag": ["ok", "failed"]})
    expected = pd.DataFrame(
        {"run_id": ["b", "a", "b"], "flag": ["failed", "ok", "failed"], "n": [1, 3, 4]}
    )
    pd.testing.assert_frame_equal(join_runs(rows, described), expected)


def test_means_over_layers():
    """Over the layers with a value; missing if no layer has one."""
    frame = pd.DataFrame(
        {
            "run_id": "a",
            "ffn": "ffn",
            "step": [0, 0, 10, 10],
            "status": ["ok", "ok", "ok", "no variance"],
            "tokens_seen": [0, 0, 5, 5],
            "train_loss": [np.nan, np.nan, 2.0, 2.0],
            "val_loss": [4.0, 4.0, 3.0, 3.0],
            "js": [0.25, 0.75, 0.5, np.nan],
            "pr_pre": [1.0, 2.0, np.nan, np.nan],
        }
    )
    means = average_layers(frame, ["js", "pr_pre"])
    assert list(means["n_layers"]) == [2, 2]
    assert list(means["n_null"]) == [0, 1]
    assert list(means["val_loss"]) == [4, 3]
    assert list(means["js"]) == [0.5, 0.5]
    assert means["pr_pre"][0] == 1.5
    assert np.isnan(means["pr_pre"][1])


def test_distinct_rows_are_numbered_as_they_appear():
    frame = pd.DataFrame({"a": [4, "8/3", None, 4, None], "b": [1, 1, 1, 2, 1]})
    assert number_rows(frame, ["a"]).tolist() == [0, 1, 2, 0, 2]
    assert number_rows(frame, ["a", "b"]).tolist() == [0, 1, 2, 3, 2]
    assert number_rows(frame, []).tolist() == [0] * 5


def test_runs_without_ffn_count_with_the_groups_of_their_values():
    points = pd.DataFrame(
        {
            "kind": ["a", "a", "a", "b", "b"],
            "data": ["d", None, "e", None, None],
            "ffn": ["ffn", None, "ffn", None, None],
            "flag": ["ok", "failed", "untrained", "failed", "no metrics"],
        }
    )
    codes, groups = group_points(points, ["kind"])
    assert codes.tolist() == [0, -1, 1, 2, 2]
    assert groups["kind"].tolist() == ["a", "a", "b"]
    assert groups["n_flagged"].tolist() == [1, 2, 2]
    codes, groups = group_points(points[:0], ["kind"])
    assert (len(codes), len(groups)) == (0, 0)


def test_different_values_are_counted_in_each_group():
    values = pd.Series(["x", "y", "x", None, "z"], index=[3, 1, 4, 1, 5])
    counts = count_distinct(np.array([0, 0, 0, 1, -1]), values, 3)
    assert counts.tolist() == [2, 0, 0]


def test_true_and_one_are_different_groups():
    values = pd.Series([True, 1, 1.0, False, 0, "a", None, np.nan, True], dtype=object)
    codes = number_rows(pd.DataFrame({"x": values, "y": "same"}), ["x", "y"])
    assert codes.tolist() == [0, 1, 1, 2, 3, 4, 5, 5, 0]


def test_interleaved_tables():
    a, b = pd.DataFrame({"n": [1, 3]}), pd.DataFrame({"n": [2, 4]})
    assert interleave([a, b])["n"].tolist() == [1, 2, 3, 4]


def with_factor(metrics, runs, name):
    """The result of each function with this factor; None if it is refused."""
    names = ["pr_post"]

    def found(function, *arguments, **others):
        try:
            return function(*arguments, **others)
        except ConfigError:
            return None

    points = found(nerve.final_metrics, metrics, runs, [name])
    results = {
        "points": points,
        "early": found(nerve.rank_early, metrics, runs, [name], names=names),
        "dose": found(nerve.dose_response, metrics, runs, dose=name, by=["o.other"], names=names),
        "by": found(nerve.dose_response, metrics, runs, dose="o.other", by=[name], names=names),
    }
    if points is not None:
        across = nerve.correlate_across_runs
        results |= {
            "designs": found(nerve.average_seeds, points),
            "across": found(across, points, [name], names=names),
            "given": found(across, points, given=[name], names=names),
            "widths": found(nerve.fit_width_scaling, points, [name], names=names),
        }
    return results


def test_a_factor_keeps_its_values_whatever_its_name_or_is_refused(tables):
    specs = [
        {
            "rows": [{"step": 0, "val_loss": 6.0}, {"step": 10, "val_loss": 3 + seed / 10 + level}],
            "run_id": f"{level}{other}{seed}",
            "seed": seed,
            "config": {"a.level": level, "o.other": other},
        }
        for level in (0, 1)
        for other in (0, 1)
        for seed in (0, 1)
    ]
    metrics, runs = tables(*specs)
    expected = with_factor(metrics, runs, "a.level")
    assert all(table is not None for table in expected.values())
    for name in ("n", "n_seeds", "val_loss_sd", "slope", "clock", "n_steps", "final_loss"):
        found = with_factor(metrics, runs.rename(columns={"a.level": name}), name)
        for key, table in found.items():
            if table is not None:
                columns = [column.replace("a.level", name) for column in expected[key]]
                pd.testing.assert_frame_equal(table, expected[key].set_axis(columns, axis=1))


def calls(frame, runs):
    """Each function that takes names, given a string instead of a list."""
    across = nerve.correlate_across_runs
    return [
        (nerve.final_metrics, (frame, runs), "factors"),
        (nerve.metrics_at_loss, (frame, runs), "factors"),
        (nerve.metrics_by_depth, (frame, runs), "factors"),
        (nerve.depth_means, (frame, runs), "names"),
        (nerve.correlate_within_runs, (frame, runs), "factors"),
        (nerve.correlate_within_runs, (frame, runs), "names"),
        (across, (frame,), "by"),
        (across, (frame,), "given"),
        (across, (frame,), "names"),
        (nerve.fit_width_scaling, (frame,), "by"),
        (partial(nerve.dose_response, dose="optimizer.lr"), (frame, runs), "by"),
        (nerve.rank_early, (frame, runs), "by"),
        (nerve.compare_seeds, (frame, runs, "optimizer.lr"), "names"),
    ]


@pytest.mark.parametrize("given", ["seed", "level", 3, None])
def test_a_name_where_a_list_of_names_belongs_is_refused(tables, tmp_path, given):
    """Its letters would be taken for names."""
    frame, runs = tables({"rows": [{"step": 0}]})
    for function, arguments, key in calls(frame, runs):
        with pytest.raises(ConfigError, match=rf"{key} must be a list of names; got {given!r}"):
            function(*arguments, **{key: given})
    for load in (nerve.load_metrics, nerve.load_spectra, nerve.load_scalars, nerve.Runs):
        with pytest.raises(ConfigError, match="factors must be a list of names; got"):
            load(tmp_path, factors=given)
