"""The content of a report: figures, which are drawn when they are written, tables and notes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nerve.derived import VERDICTS, describe_outliers
from nerve.sites_and_groups import SITES

WINDOW_TEXTS = {
    "all": "all measured steps",
    "after_warmup": "the measured steps after the warm-up",
    "differences": "the changes between consecutive measured steps",
}
"""The windows of correlations within runs, in words."""


@dataclass(frozen=True)
class Drawing:
    """A figure to be drawn: the name of its files, its caption, and the function that draws it."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Table:
    """A table: the name of its files, its caption, all rows, and the columns shown on the page.

    Args:
        name: name of the files.
        caption: says what a row is, in a sentence or two.
        frame: the rows.
        shown: columns for the page; missing ones are skipped. None shows all.
        in_page: False if the table is only in the files.
    """

    name: str
    caption: str
    frame: pd.DataFrame
    shown: Sequence[str] | None = None
    in_page: bool = True


@dataclass
class Content:
    """A report before it is written.

    Args:
        title: title of the page.
        facts: labels and values, for the head of the page.
        notes: sentences about what is missing, left out, or to be read with care.
        drawings: the figures.
        tables: the tables.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def known(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns that have any value; runs of earlier versions lack some columns."""
    return [name for name in columns if name in frame and frame[name].notna().any()]


def limits(metrics: pd.DataFrame) -> str:
    """The sentences on sampling and rank at the end of every caption about metrics."""
    if metrics.empty:
        return "Nothing was measured."
    ratio = metrics["n_samples"] / metrics["d_ff"]
    return (
        f"N = {_range(metrics['n_samples'])} samples, D = {_range(metrics['d_ff'])} features, "
        f"N/D = {_range(ratio)}. rank(pre) ≤ min(d_in, D, N − 1) = "
        f"{_range(metrics['rank_limit_pre'])}, with d_in = {_range(metrics['d_in'])} (d_model, or "
        f"the patches of token mixing); rank(post) ≤ {_range(metrics['rank_limit_post'])}: PR and "
        "exp(SE) cannot exceed these."
    )


def seeds(designs: pd.DataFrame) -> str:
    """A sentence on the number of seeds of the designs (rows of `average_seeds`)."""
    counts = designs.loc[designs["n_seeds"] > 0].groupby("design_id")["n_seeds"].max()
    if counts.empty:
        return "No run can be compared."
    n_designs = f"{len(counts)} design{'s' if len(counts) > 1 else ''}"
    if counts.max() == 1:
        return f"{n_designs}, one seed each: no intervals over seeds."
    return f"{n_designs} with {_range(counts)} seeds each."


def dead_layers(metrics: pd.DataFrame) -> list[str]:
    """A sentence on rows in which nothing could be measured."""
    null = metrics.loc[metrics["status"] != "ok"]
    if null.empty:
        return []
    every = "all" if len(null) == len(metrics) else f"{len(null):,} of {len(metrics):,}"
    reasons = ", ".join(f"{reason} ({n:,})" for reason, n in _counts(null["status"]).items())
    return [
        f"In {every} rows of metrics (a row is a layer at a step) nothing could be measured: "
        f"{reasons}. They are blank in figures and excluded from means."
    ]


def sampled_rows(metrics: pd.DataFrame) -> list[str]:
    """A sentence on how many rows have enough samples, if some do not."""
    counts = _counts(metrics["sampling"])
    if metrics.empty or counts.get(VERDICTS[0], 0) == counts.sum():
        return []
    rated = ", ".join(f"{counts[each]:,} {each}" for each in VERDICTS if each in counts)
    return [
        f"Sampling of {counts.sum():,} rows of metrics: {rated}. The rating depends on how far PR "
        "moves when it is extrapolated from halves to infinitely many samples (well up to 5%, "
        "under up to 20%) or, if no halves were measured, on N/D (well from 8, under from 2). "
        "Fewer samples lower PR and SE and raise EEE; increase monitor.n_tokens for more samples."
    ]


def outlying_rows(metrics: pd.DataFrame) -> list[str]:
    """Sentences on rows whose spectrum may be dominated by a few samples."""
    notes = []
    for site in SITES:
        found = np.flatnonzero(metrics["outliers"].str.contains(site, regex=False))
        if len(found):
            shares = metrics[f"top_share_{site}"].to_numpy(float)[found]
            place = int(np.argsort(np.nan_to_num(shares, nan=-1.0), kind="stable")[-1])
            worst = metrics.iloc[found[place]].to_dict()
            notes.append(
                f"In {len(found):,} of {len(metrics):,} rows of metrics, a few samples may "
                f"dominate the spectrum of {site}. The worst row is run {worst['run_id']}, layer "
                f"{worst['layer']}, step {worst['step']:,}: {describe_outliers(worst, site)}. The "
                "column outliers of load_metrics marks these rows; monitor.skip_first excludes the "
                "first tokens."
            )
    return notes


def _counts(texts: pd.Series) -> pd.Series:
    """How often each string occurs, without unused categories."""
    counts = texts.value_counts()
    return counts[counts > 0]


def _range(values: pd.Series) -> str:
    low, high = (f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in _ends(values))
    return low if low == high else f"{low} to {high}"


def _ends(values: pd.Series) -> tuple[float, float]:
    return float(values.min()), float(values.max())
