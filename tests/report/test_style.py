"""Text of runs is drawn literally, colors are distinguishable, and legends do not cover the
data."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from nerve.analysis.factors import level_text, levels_of, ordered_levels
from nerve.report.style import (
    COLORS,
    LEVEL_COLORS,
    MAX_LEGEND,
    axis_label,
    key,
    level_colors,
    level_keys,
    name_axes,
    new_figure,
    outside_legend,
    plain_text,
    scale_by_ratio,
    short_name,
)

# Machado, Oliveira & Fernandes (2009), severity 1, on linear RGB.
DICHROMATS = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def lab(color: str, matrix: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of an sRGB color as seen through a linear-RGB `matrix`."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(matrix @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.array(to_xyz) @ seen / [0.95047, 1.0, 1.08883]
    fx, fy, fz = (
        t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29 for t in (x, y, z)
    )
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("kind", [None, *DICHROMATS])
def test_colors_are_distinguishable_with_all_kinds_of_color_vision(kind):
    """ΔE (CIE 1976) of pre and post, and of the first four levels; 10 is clearly visible."""
    matrix = np.eye(3) if kind is None else np.array(DICHROMATS[kind])
    for group in (list(COLORS.values()), list(LEVEL_COLORS[:4])):
        seen = [lab(color, matrix) for color in group]
        for i, one in enumerate(seen):
            for other in seen[i + 1 :]:
                assert np.linalg.norm(one - other) > 10
    assert not set(COLORS.values()) & set(LEVEL_COLORS)


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("$x_{$", "$x_{$"),
        ("$\\frac{1}{0}$", "$\\frac{1}{0}$"),
        ("two\nlines\t", "two lines"),
        ("a\u202eb\x00", "a�b�"),
        ("x" * 60, "x" * 47 + "…"),
    ],
)
def test_text_of_runs_is_drawn_literally(text, drawn):
    """No mathematics, no control characters, one line: the string passed to the renderer."""
    figure, (panel,) = new_figure(1, 1, text)
    artist = panel.set_title(plain_text(text))
    figure.draw_without_rendering()
    line, is_math = artist._preprocess_math(artist.get_text())
    assert (line, is_math) == (drawn, False)


def test_a_level_that_starts_with_an_underscore_is_in_the_legend():
    figure, _ = new_figure(1, 1, "t")
    outside_legend(
        figure, [key(plain_text("_nolegend_"), color="k"), key("b", color="k")], "factor"
    )
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [" _nolegend_", "b"]


@pytest.mark.parametrize("n_rows", [1, 2])
def test_the_legend_is_below_all_panels(n_rows):
    figure, panels = new_figure(n_rows, 2, "title")
    for panel in panels:
        panel.plot([0, 1], [0, 1])
        name_axes(panel, "step", "pr_post", "PR post")
    outside_legend(figure, [key(str(i), color="k") for i in range(9)], "factor")
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert legend.y1 <= min(panel.get_tightbbox().y0 for panel in panels)
    assert legend.y0 >= 0
    assert legend.x0 >= 0
    assert legend.x1 <= figure.bbox.x1


def test_levels_are_ordered_and_written_as_on_the_command_line():
    values = pd.Series([10, 2.0, "8/3", None, True, "a", 2], dtype=object)
    levels = ordered_levels(values)
    assert [level_text(level) for level in levels] == ["2", "8/3", "10", "true", "a", "not set"]
    assert level_text(3e-3) == "0.003"
    assert level_text(np.float64(4)) == "4"
    assert level_text(float("nan")) == "not set"


def test_values_that_differ_are_different_levels():
    values = pd.Series([1, True, 0, False, 1000000, 1000001, 0.1234567, 0.1234568], dtype=object)
    texts = [level_text(level) for level in ordered_levels(values)]
    numbers = ["0", "0.1234567", "0.1234568", "1", "1000000", "1000001"]
    assert texts == [*numbers, "false", "true"]
    assert sorted(texts) == sorted(levels_of(values))


def test_names_get_distinct_colors_and_numbers_a_scale():
    names = level_colors(["gelu", "relu", None])
    assert list(names) == ["gelu", "relu", "not set"]
    assert len(set(names.values())) == 3
    assert set(names.values()) <= set(LEVEL_COLORS)
    widths = level_colors([1, 2, 4, 8])
    luminance = [np.dot(color[:3], [0.2126, 0.7152, 0.0722]) for color in widths.values()]
    assert luminance == sorted(luminance)
    many = level_colors([f"name {i}" for i in range(40)])
    assert len(set(many.values())) == 40
    keys = [entry.get_label() for entry in level_keys(many)]
    assert len(keys) == MAX_LEGEND
    assert (keys[0], keys[-1]) == ("name 0", "name 39")


def test_labels_have_units_and_short_names():
    assert axis_label("se_pre") == "SE (nats)"
    assert axis_label("pr_post") == "PR (dimensions)"
    assert axis_label("js") == "JS (nats)"
    assert axis_label("step") == "optimizer step"
    assert [short_name(name) for name in ("se_pre", "pr_post", "js", "delta_eee", "pr_gain")] == [
        "SE pre",
        "PR post",
        "JS",
        "ΔEEE",
        "PR gain",
    ]


@pytest.mark.parametrize(
    ("values", "scale"), [([1.0, 3.9], "linear"), ([1.0, 290.0], "log"), ([np.nan, 0.0], "linear")]
)
def test_only_wide_ranges_are_logarithmic(values, scale):
    _, (panel,) = new_figure(1, 1, "t")
    scale_by_ratio(panel, pd.Series(values))
    assert panel.get_yscale() == scale
