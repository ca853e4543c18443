"""A paper's values as marks: their positions, and invalid files."""

import pytest
from matplotlib.figure import Figure

from nerve.errors import ConfigError
from nerve.report.reference import mark, read_reference
from nerve.report.style import name_axes, panel_columns

FILE = """\
metric,value,label,step,layer,val_loss
pr_post,860,"GELU, paper",1000,,
pr_post,600,ReLU,,3,
se_post,7.4,ReLU,,,2.98
val_loss,2.7,ReLU,,,
"""


@pytest.fixture
def reference(tmp_path):
    path = tmp_path / "paper.csv"
    path.write_text(FILE)
    return read_reference(path)


def panel(x, y, columns=None):
    figure = Figure()
    axes = figure.add_subplot()
    name_axes(axes, x, y, columns=columns)
    return figure, axes


@pytest.mark.parametrize(
    ("x", "y", "points"),
    [
        ("step", "pr_post", [(1000, 860)]),
        ("layer", "pr_post", [(3, 600)]),
        ("depth", "pr_post", []),
        ("val_loss", "se_post", [(2.98, 7.4)]),
        ("step", "se_post", []),
        ("step", "pr_pre", []),
    ],
)
def test_a_value_is_marked_in_the_panels_of_its_metric_and_position(reference, x, y, points):
    figure, axes = panel(x, y)
    mark(figure, reference)
    drawn = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines]
    assert drawn == points
    assert len(figure.legends) == len(points)


def test_a_value_without_a_position_is_a_line(reference):
    figure, axes = panel("step", "val_loss")
    mark(figure, reference)
    line, end = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 1], [2.7, 2.7])
    assert end.get_marker() != "None"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ReLU"]


def test_a_panel_of_both_sites_has_the_marks_of_both(reference):
    figure, axes = panel("step", "pr_pre", ("pr_pre", "pr_post"))
    assert panel_columns(axes) == ("step", ["pr_pre", "pr_post"])
    mark(figure, reference)
    assert len(axes.lines) == 1
    unnamed = Figure()
    unnamed.add_subplot()
    assert not mark(unnamed, reference).legends


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric,value\npr_post,1\n", "lacks label"),
        ("metric,value,label\npr_pots,1,a\n", "Did you mean 'pr_post'"),
        ("metric,value,label\npr_post,many,a\n", r"value must be a finite number .*got \['many'\]"),
        ("metric,value,label\npr_post,,a\n", "value must be a finite number"),
        ("metric,value,label\npr_post,inf,a\n", r"a finite number .*got \['inf'\]"),
        ("metric,value,label,step\npr_post,1,a,inf\n", "step must be a finite number"),
        ("metric,value,label,step\npr_post,1,a,late\n", r"step must be a finite .*got \['late'\]"),
        (
            "metric,value,label,step,layer\npr_post,1,a,10,3\n",
            r"only one of step.*rows \[1\] .* have several",
        ),
        ("", "cannot be read"),
    ],
)
def test_a_file_that_is_not_a_reference_is_refused(tmp_path, text, message):
    path = tmp_path / "paper.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_reference(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv cannot be read"):
        read_reference(tmp_path / "none.csv")
