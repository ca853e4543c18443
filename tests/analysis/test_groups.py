"""Comparing the PR of groups: which step, which ratios, and the order of averaging."""

import math

import pandas as pd
import pytest

from nerve.analysis.groups import contrast_groups, pr_of_groups
from nerve.errors import ConfigError

WIDTH = "ffn.width"


def rows_of(run: str, step: int, prs: dict[tuple[str, str], tuple[float, ...]]) -> list[dict]:
    """Rows of `load_groups`: the PR of a site's group by layer."""
    return [
        {"run_id": run, "step": step, "layer": layer, "ffn": "ffn"}
        | {"site": site, "group": group, "pr": pr}
        for (site, group), layers in prs.items()
        for layer, pr in enumerate(layers)
    ]


@pytest.fixture
def frames(tables):
    """Two seeds of one design and one of another, with two layers, measured at steps 0, 10 and 20,
    with groups at 0 and 10."""
    of_run = [{"step": s, "layer": i, "val_loss": 6 - s / 10} for s in (0, 10, 20) for i in (0, 1)]
    specs = [
        {"seed": seed, "config": {WIDTH: width}, "rows": of_run, "unigram_loss": None}
        for seed, width in ((0, 4), (1, 4), (0, 8))
    ]
    metrics, runs = tables(*specs)
    head, tail = ("post", "head"), ("post", "tail")
    groups = [row for run in ("run0", "run1", "run2") for row in rows_of(run, 0, {head: (9, 9)})]
    groups += rows_of("run0", 10, {head: (1, 1), tail: (2, 8), ("output", "all"): (3, 4)})
    groups += rows_of("run1", 10, {head: (2, 2), tail: (4, 4)})
    groups += rows_of("run2", 10, {head: (5, math.nan), tail: (5, 7)})
    return metrics, pd.DataFrame(groups), runs


def test_pr_has_a_column_per_group_at_the_last_step_with_groups(frames):
    rows = pr_of_groups(*frames, [WIDTH])
    assert list(rows["run_id"]) == ["run0", "run0", "run1", "run1", "run2", "run2"]
    assert set(rows["step"]) == {10}
    assert set(rows["flag"]) == {"ok"}  # by all steps: at one alone nobody sees a loss fall
    assert list(rows["depth"]) == [0.25, 0.75] * 3
    assert list(rows[WIDTH]) == [4, 4, 4, 4, 8, 8]
    assert list(rows["pr_post_tail"]) == [2, 8, 4, 4, 5, 7]
    assert list(rows["pr_post_tail_to_head"][:5]) == [2, 8, 2, 2, 1]
    assert rows["pr_post_tail_to_head"].isna().sum() == 1
    assert list(rows["pr_output_all"][:2]) == [3, 4]
    assert rows["pr_output_all"][2:].isna().all()
    assert "pr_pre_tail_to_head" not in rows


def test_ratios_are_geometric_means_over_layers_and_means_over_seeds(frames):
    """By hand: run 0 has 2 and 8, so 4; run 1 has 2. One layer of run 2 could be measured."""
    table = contrast_groups(pr_of_groups(*frames, [WIDTH]), [WIDTH]).set_index(WIDTH)
    assert list(table["n_seeds"]) == [2, 1]
    assert table["ratio"].to_dict() == pytest.approx({4: 3.0, 8: 1.0})
    assert table["ratio_sd"][4] == pytest.approx(math.sqrt(2))
    assert math.isnan(table["ratio_sd"][8])
    assert table["pr_group"].to_dict() == {4: (5 + 4) / 2, 8: 5}
    assert table["pr_other"].to_dict() == {4: (1 + 2) / 2, 8: 5}
    names = ["site", "grouping", "group", "other"]
    assert table[names].drop_duplicates().to_numpy().tolist() == [
        ["post", "frequency", "tail", "head"]
    ]


def test_a_flagged_run_is_in_no_contrast(frames):
    """By hand: of the two seeds at width 4, run 0 alone is left, with the ratio 4."""
    metrics, groups, runs = frames
    runs = runs.assign(run_status=runs["run_status"].where(runs["run_id"] != "run1", "failed"))
    rows = pr_of_groups(metrics, groups, runs, [WIDTH])
    assert set(rows["run_id"]) == {"run0", "run1", "run2"}
    table = contrast_groups(rows, [WIDTH]).set_index(WIDTH)
    assert table["n_seeds"].to_dict() == {4: 1, 8: 1}
    assert table["ratio"].to_dict() == pytest.approx({4: 4.0, 8: 1.0})
    assert contrast_groups(rows[rows["run_id"] == "run1"], [WIDTH]).empty


def test_runs_that_are_left_out_have_no_rows(frames):
    metrics, groups, runs = frames
    assert set(pr_of_groups(metrics, groups, runs[1:])["run_id"]) == {"run1", "run2"}


def test_without_groups_there_is_nothing(frames):
    metrics, groups, runs = frames
    rows = pr_of_groups(metrics, groups[:0], runs, [WIDTH])
    assert rows.empty
    assert contrast_groups(rows, [WIDTH]).empty


def test_other_frames_are_refused(frames):
    metrics, _, runs = frames
    with pytest.raises(ConfigError, match="rows of load_groups with the column site"):
        pr_of_groups(metrics, metrics, runs)
    with pytest.raises(ConfigError, match="rows of pr_of_groups with the column design_id"):
        contrast_groups(metrics)
    with pytest.raises(ConfigError, match=r"list of names; got 'data'"):
        contrast_groups(metrics, "data")


def test_contrasts_have_the_same_columns_and_one_index_for_any_number_of_rows(frames):
    metrics, groups, runs = frames
    more = groups[groups["group"].isin(["head", "tail"])].assign(site="pre")
    found = contrast_groups(pr_of_groups(metrics, pd.concat([groups, more]), runs))
    assert [*found.index] == [0, 1, 2, 3]  # two designs, two sites
    none = contrast_groups(pr_of_groups(metrics, groups.iloc[:0], runs))
    assert [*none.columns] == [*found.columns]
    assert none.empty
