"""The figure of effects: a row for each core check."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from criteria.check import Judged
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from panels import BLACK, GREEN, WIDTH, WINE

from nerve.analysis.estimate import Outcome
from nerve.report.style import FLAGGED_COLOR, key, new_figure, outside_legend

COLORS: Mapping[Outcome, str] = {
    "holds": GREEN,
    "opposite": WINE,
    "within noise": FLAGGED_COLOR,
    "undecided": "white",
}
LINEAR = 10.0
"""Up to so many units the axis is linear, beyond it logarithmic."""


def effects(judged: Sequence[Judged]) -> Figure:
    """Each check's effect with its 95% interval, in units of what seeds differ by.

    Correlations have no spread of seeds: theirs is a quarter of the interval. A diamond is the
    paper's value, a bar the smallest effect of interest; to the left of 0 is the opposite of what
    the claim says.
    """
    rows = [each for each in judged if each.estimate is not None and each.estimate.has_interval]
    figure, (panel,) = new_figure(
        1, 1, "The effect of each core check, in spreads of seeds", width=WIDTH, height=9.0
    )
    for place, each in enumerate(rows):
        _row(panel, -place, each)
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
    panel.set_xlim(-150, 500)
    panel.set_xticks([-100, -10, -5, 0, 5, 10, 100], ["-100", "-10", "-5", "0", "5", "10", "100"])
    panel.set_yticks(
        [-place for place in range(len(rows))],
        [fill(f"{each.check.id}  {each.check.states}", 62) for each in rows],
        fontsize=6.5,
    )
    panel.set_ylim(0.7 - len(rows), 0.7)
    panel.set_xlabel("effect, in spreads between seeds (logarithmic beyond 10)", fontsize=8)
    panel.grid(axis="x", linewidth=0.3)
    outside_legend(figure, _keys(), n_columns=3)
    return figure


def _row(panel: Axes, place: int, each: Judged) -> None:
    assert each.estimate is not None
    estimate = each.estimate
    unit = estimate.sd if np.isfinite(estimate.sd) else (estimate.high - estimate.low) / 4
    low, effect, high = (value / unit for value in (estimate.low, estimate.effect, estimate.high))
    reading = each.reading
    edge = COLORS[reading] if reading is not None else FLAGGED_COLOR
    face = edge if each.outcome != "undecided" else COLORS["undecided"]
    panel.plot([low, high], [place, place], color=edge, linewidth=1.4)
    panel.plot(effect, place, marker="o", markersize=6, color=edge, markerfacecolor=face)
    if each.check.smallest:
        panel.plot(each.check.smallest / unit, place, marker="|", color=BLACK, markersize=9)
    if each.check.paper_value is not None:
        panel.plot(
            each.check.paper_value / unit,
            place,
            marker="D",
            markersize=5,
            color=BLACK,
            markerfacecolor="none",
            linestyle="none",
        )


def _keys() -> list[Line2D]:
    dot = {"marker": "o", "markersize": 6}
    readings: tuple[Outcome, ...] = ("holds", "opposite", "within noise")
    return [
        *(
            key(name.replace("noise", "noise, or less than asked"), color=COLORS[name], **dot)
            for name in readings
        ),
        key(
            "hollow: undecided (too few, too small or older)",
            color=BLACK,
            markerfacecolor="none",
            **dot,
        ),
        key("the paper's value", color=BLACK, marker="D", markerfacecolor="none", linestyle="none"),
        key("smallest effect of interest", color=BLACK, marker="|", linestyle="none"),
    ]
