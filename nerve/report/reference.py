"""Values of a paper, read from a small CSV file, as marks in the figures of a report.

Columns: `metric` (`pr_post`, `val_loss`), `value`, `label` (the name in the legend), and the
position of the value: `step`, `layer` or `val_loss`, at most one of them per row. A value without a
position is drawn as a line through each panel of its metric.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nerve.config import require, require_choice
from nerve.errors import ConfigError
from nerve.metric_names import CATALOG, metric_of
from nerve.report.style import COLORS, LOSS_COLOR, key, panel_columns, plain_text
from nerve.sites_and_groups import SITES
from nerve.storage.find import AnyPath

PLACES = ("step", "layer", "val_loss")
MARKED = ("val_loss", *(column for metric in CATALOG for column in metric.columns))
LEGEND_WIDTH = 1.6
"""Inches."""

LINE = (0, (6, 2, 1, 2))
MARKERS = ("*", "P", "X", "D", "v", "^", "<", ">")


def read_reference(path: AnyPath) -> pd.DataFrame:
    """The rows of such a file, with all columns, and numbers as floats.

    Raises:
        ConfigError: for a file that cannot be read or lacks a column, for an unknown metric, and
            for a value that is not a number.
    """
    try:
        rows = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise ConfigError(
            f"A reference must be a CSV file; {path} cannot be read: {error}"
        ) from error
    missing = [name for name in ("metric", "value", "label") if name not in rows]
    require(
        not missing,
        f"A reference must have the columns metric, value and label, and may have "
        f"{', '.join(PLACES)}; {path} lacks {', '.join(missing)}.",
    )
    for metric in rows["metric"].unique():
        require_choice(f"The metric of a row of {path}", metric, MARKED)
    rows = rows.reindex(columns=["metric", "value", "label", *PLACES])
    for name in ("value", *PLACES):
        numbers = pd.to_numeric(rows[name], errors="coerce")
        wrong = rows[name][~np.isfinite(numbers) & (rows[name].notna() | (name == "value"))]
        require(
            not len(wrong),
            f"{name} must be a finite number in each row of {path}; got {list(wrong)[:3]}.",
        )
        rows[name] = numbers.astype(float)
    doubled = np.flatnonzero(rows[list(PLACES)].notna().sum(axis=1) > 1) + 1
    require(
        not len(doubled),
        f"A row may have only one of {', '.join(PLACES)}; rows {doubled.tolist()} of {path} have "
        "several.",
    )
    return rows.assign(label=rows["label"].fillna("reference"))


def mark(figure: Figure, reference: pd.DataFrame) -> Figure:
    """The figure with a mark for each value of a metric that one of its panels shows, and a legend.

    Panels of other metrics, or with another x axis, are unchanged.
    """
    styles = dict(zip(dict.fromkeys(reference["label"]), MARKERS * 9, strict=False))
    used: dict[str, Any] = {}
    for panel in figure.axes:
        for row in _of_panel(panel, reference).to_dict("records"):
            _draw(panel, row, styles[row["label"]])
            used[row["label"]] = styles[row["label"]]
    if used:
        entries = [
            key(plain_text(label), color=LOSS_COLOR, marker=marker, linestyle=LINE, linewidth=1)
            for label, marker in used.items()
        ]
        _add_legend(figure, entries)
    return figure


def _of_panel(panel: Axes, reference: pd.DataFrame) -> pd.DataFrame:
    x, names = panel_columns(panel)
    rows = reference[reference["metric"].isin(names)]
    nowhere = rows[list(PLACES)].isna().all(axis=1)
    here = rows[x].notna() if x in PLACES else pd.Series(False, index=rows.index)
    return rows.assign(x=rows[x] if x in PLACES else np.nan)[nowhere | here]


def _draw(panel: Axes, row: dict[Any, Any], marker: str) -> None:
    color = _color(row["metric"])
    if np.isnan(row["x"]):
        panel.axhline(row["value"], color=color, linestyle=LINE, linewidth=1)
    # The marker of a line is at its end.
    place = (
        (row["x"], panel.transData) if np.isfinite(row["x"]) else (1, panel.get_yaxis_transform())
    )
    panel.plot(
        [place[0]],
        [row["value"]],
        marker,
        transform=place[1],
        color=color,
        markersize=8,
        markeredgecolor="white",
        markeredgewidth=0.6,
        clip_on=False,
        zorder=5,
    )


def _color(column: str) -> str:
    metric = metric_of(column)
    sites = [site for site in SITES if metric and metric.has_sites and metric.at(site) == column]
    return COLORS[sites[0]] if sites else LOSS_COLOR


def _add_legend(figure: Figure, entries: Sequence[Any]) -> None:
    """Adds a legend to the right of all panels, away from the title and the figure's own legend."""
    figure.set_size_inches(figure.get_figwidth() + LEGEND_WIDTH, figure.get_figheight())
    figure.legend(
        handles=list(entries), loc="outside right upper", title="marks", fontsize=8, frameon=False
    )
