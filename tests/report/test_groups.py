"""The parts of reports about groups of tokens, sites and sampling, from small measured runs."""

import numpy as np
import pytest
import torch

import nerve
from nerve.analysis.groups import pr_of_groups
from nerve.analysis.load import Runs
from nerve.models.gpt import GPT, GPTConfig
from nerve.report.content import sampled_rows
from nerve.report.figures_of_groups import (
    SHOWN,
    groups_by_depth,
    groups_by_factor,
    sites_by_depth,
)
from nerve.report.groups import drawings_by_factor, last_of, tables_by_factor
from nerve.report.one_run import content_of_run
from nerve.report.several_runs import content_of_runs
from nerve.report.style import LEVEL_COLORS

# Of a model that is measured and not trained nothing is logged.
pytestmark = pytest.mark.filterwarnings("ignore:Runs without scalars")

GROUPINGS = ["position", "frequency", "halves"]
SITES = ["stream_in", "input", "output", "stream_out"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Runs:
    """A GPT of two layers, with all groups and sites at two steps, and one step without."""
    folder = tmp_path_factory.mktemp("report") / "run"
    config = GPTConfig(n_layers=2, d_model=8, n_heads=2, seq_len=9, vocab_size=8)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(8, (20, 9), generator=generator)
    series = [(step, GPT(config, seed=step)) for step in (0, 5)]
    nerve.measure(series, [batch], into=folder, groups=GROUPINGS, sites=SITES)
    return Runs(folder)


def test_a_report_has_a_figure_for_each_grouping_and_one_of_the_sites(measured):
    content = content_of_run(measured, "all")
    names = [drawing.name for drawing in content.drawings]
    expected = [*(f"groups_{name}" for name in GROUPINGS), "sites"]
    assert [name for name in names if name.startswith(("groups", "sites"))] == expected
    for drawing in content.drawings:
        if drawing.name in expected:
            assert "step 5" in drawing.caption
            drawing.draw().draw_without_rendering()
    tables = {table.name: table.frame for table in content.tables}
    assert len(tables["sampling"]) == 4
    assert set(tables["groups"]["step"]) == {5}


def test_lines_are_the_rows_of_a_group_layer_by_layer(measured):
    groups = last_of(measured.groups)
    figure = groups_by_depth(groups, "position", "t")
    assert len(figure.axes) == 2 * len(SHOWN)
    own = groups[(groups["group"] == "q2") & (groups["site"] == "post")].sort_values("layer")
    panel = figure.axes[2 * SHOWN.index("pr") + 1]
    (line,) = [each for each in panel.lines if each.get_color() == LEVEL_COLORS[3]]
    np.testing.assert_array_equal(line.get_ydata(), own["pr"])
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "q2 (N = 40)" in entries  # 8 later positions, so two of each of 20 sequences


def test_the_sites_are_drawn_in_the_order_of_the_block_with_their_widths(measured):
    figure = sites_by_depth(last_of(measured.groups), "t")
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    expected = ["stream_in (D = 8)", "input (D = 8)", "pre (D = 32)", "post (D = 32)"]
    assert entries == [*expected, "output (D = 8)", "stream_out (D = 8)"]
    assert all(len(panel.lines) == 6 for panel in figure.axes)


def test_verdicts_on_sampling_are_in_the_notes(measured):
    """If some rows have too few samples; no note if all have enough."""
    metrics = measured.metrics.assign(sampling=["well", "under", "under", "severely under"])
    (note,) = sampled_rows(metrics)
    assert note.startswith("Sampling of 4 rows of metrics: 1 well, 2 under, 1 severely under.")
    assert sampled_rows(metrics.assign(sampling="well")) == []
    assert set(content_of_run(measured, "all").notes) >= {*sampled_rows(measured.metrics)}


def test_a_run_without_groups_has_no_figure_of_them(measured, tmp_path):
    config = GPTConfig(n_layers=1, d_model=8, n_heads=2, seq_len=9, vocab_size=8)
    nerve.measure(GPT(config), [torch.randint(8, (400, 9))], into=tmp_path / "run")
    content = content_of_run(Runs(tmp_path / "run"), "all")
    assert not [d for d in content.drawings if d.name.startswith(("groups", "sites"))]
    assert not [note for note in content.notes if note.startswith("Sampling")]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Runs:
    """Two GPTs with one and three layers, measured with groups and three sites."""
    folder = tmp_path_factory.mktemp("report")
    batch = torch.randint(8, (20, 9), generator=torch.Generator().manual_seed(0))
    how = {"groups": GROUPINGS, "sites": SITES[:3], "forward": with_loss}
    for n_layers in (1, 3):
        config = GPTConfig(n_layers=n_layers, d_model=8, n_heads=2, seq_len=9, vocab_size=8)
        nerve.measure(GPT(config), [batch], into=folder / f"run{n_layers}", **how)
    return Runs(folder)


def with_loss(model: GPT, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"loss": model(batch).logsumexp(-1).mean()}


def test_a_report_on_several_runs_has_groups_and_sites_by_factor(two):
    content = content_of_runs(two, "all", "t")
    drawn = {drawing.name: drawing for drawing in content.drawings}
    names = [f"{what}_by_run_id" for what in ("groups_position", "groups_frequency", "sites")]
    assert [name for name in drawn if name.startswith(("groups", "sites"))] == names
    for name in names:
        assert "the last step with" in drawn[name].caption
    sites = drawn["sites_by_run_id"].draw()
    sites.draw_without_rendering()
    titles = [panel.get_title() for panel in sites.axes]
    assert titles == [f"PR {site}" for site in ("stream_in", "input", "pre", "post", "output")]
    tables = {table.name: table.frame for table in content.tables}
    assert len(tables["groups"]) == 1 + 3
    assert len(tables["group_contrasts"]) == 2 * 2 * 3  # designs, sites, pairs
    flagged = tables["groups"].assign(flag="no loss")
    assert [table.name for table in tables_by_factor(flagged, [])] == ["groups"]


def test_groups_of_a_site_share_an_axis_and_a_ratio_has_a_line_at_one(two):
    rows = pr_of_groups(two.metrics, two.groups, two.frame)
    figure = groups_by_factor(rows, "frequency", "run_id", [], "t")
    titles = [panel.get_title() for panel in figure.axes]
    groups = ("head", "mid", "tail", "tail / head")
    assert titles == [f"PR {site}, {group}" for site in ("pre", "post") for group in groups]
    for row in (figure.axes[:4], figure.axes[4:]):
        assert len({panel.get_ylim() for panel in row[:3]}) == 1
        assert [len(panel.lines) for panel in row] == [2, 2, 2, 3]
        assert set(row[3].lines[-1].get_ydata()) == {1}
    tail = figure.axes[6].lines[1].get_ydata()
    own = rows[rows["run_id"] == two.frame["run_id"][1]].sort_values("layer")
    np.testing.assert_array_equal(tail, own["pr_post_tail"])


def test_several_runs_without_groups_have_no_figure_of_them(two):
    rows = pr_of_groups(two.metrics, two.groups[:0], two.frame)
    assert drawings_by_factor("ffn", rows, ["run_id"], [], "") == []
    assert tables_by_factor(rows, []) == []
