"""The figure of the longest runs: over steps and over layers, with the paper's values as marks."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from claims.normfree import named
from evidence import Sweep
from matplotlib.figure import Figure
from panels import (
    BLACK,
    GREEN,
    ORANGE,
    PINK,
    WINE,
    caption,
    legend,
    over_layers,
    over_steps,
    panels,
)

from nerve.report.style import key, scale_by_ratio

STYLES: Mapping[str, Mapping[str, Any]] = {
    "PreLN GELU": {"color": GREEN},
    "norm-free GELU": {"color": WINE},
    "norm-free ReLU": {"color": PINK},
    "norm-free learnable leaky ReLU": {"color": ORANGE},
}
MARK: Mapping[str, Any] = {
    "marker": "D",
    "color": BLACK,
    "markerfacecolor": "none",
    "linestyle": "none",
    "markersize": 5,
}
PAPERS: Mapping[str, tuple[float, ...]] = {
    "se_pre": (5.57,),
    "se_post": (7.40,),
    "pr_pre": (125.0,),
    "pr_post": (860.0,),
}
"""PreLN GELU at the end of the paper's training."""
PAPERS_DEPTH: Mapping[str, tuple[tuple[float, float], ...]] = {
    "js": ((3, 0.28),),
    "pr_gain": ((1, 290.0),),
}
"""(layer, value): the peak of PreLN GELU; the largest gain without norms."""


def long_runs(sweep: Sweep) -> Figure:
    """Loss, SE and PR over steps; PR gain and JS over layers at the last step."""
    sweep = named(sweep)
    about = f"GPT, {caption(sweep)} (bands: lowest to highest seed; thin lines: seeds)"
    figure, axes = panels(2, 4, "The longest runs, with norms and without", about, height=2.5)
    curves = sweep.curves
    late = curves[curves["step"] >= 0.1 * curves["step"].max()]
    over_steps(axes[0], late, "val_loss", STYLES)
    axes[0].set_title("loss, from a tenth on", fontsize=8)
    for panel, name in zip((axes[1], axes[2], axes[4], axes[5]), PAPERS, strict=True):
        over_steps(panel, curves, name, STYLES)
        end = curves["step"].max()
        panel.plot([end] * len(PAPERS[name]), PAPERS[name], **MARK)
        if name.startswith("pr_"):
            scale_by_ratio(panel, pd.Series([*curves[name], *PAPERS[name]]))
    for panel, name in zip((axes[3], axes[7]), ("js", "pr_gain"), strict=True):
        over_layers(panel, sweep.layers, name, STYLES)
        panel.plot(*zip(*PAPERS_DEPTH[name], strict=True), **MARK)
    over_layers(axes[6], sweep.layers, "eee_post", STYLES)
    scale_by_ratio(axes[7], pd.Series([*sweep.layers["pr_gain"], 290.0]))
    legend(figure, STYLES, key("the paper's", **MARK), n_columns=3)
    return figure
