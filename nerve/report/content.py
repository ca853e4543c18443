"""What a report holds: figures that are drawn when they are written, tables, notes, captions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nerve.derived import VERDICTS, describe_outliers
from nerve.metric_names import SITES

WINDOW_TEXTS = {
    "all": "all measured steps",
    "after_warmup": "the measured steps after the warm-up",
    "differences": "the changes from one measured step to the next",
}
"""What the windows of correlations within runs take, in words."""


@dataclass(frozen=True)
class Drawing:
    """A figure to be: its file's name, what it shows, and how it is drawn."""

    name: str
    caption: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Table:
    """A table: its file's name, what it holds, all its columns, and those that the page shows.

    Args:
        name: of the files.
        caption: what a row is, in a sentence or two.
        frame: the rows.
        shown: columns for the page; those that are not there are passed over. None shows all.
        in_page: False for what only the files hold.
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
        title: of the page.
        facts: label and value, for the head of the page.
        notes: sentences on what is missing, left out, or to be read with care.
        drawings: the figures.
        tables: the tables.
    """

    title: str
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def known(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """The columns that hold a value: runs of earlier versions lack some."""
    return [name for name in columns if name in frame and frame[name].notna().any()]


def limits(metrics: pd.DataFrame) -> str:
    """The sentences on sampling and rank that every caption of metrics ends with."""
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
    """A sentence on how many seeds are behind the designs (rows of `average_seeds`)."""
    counts = designs.loc[designs["n_seeds"] > 0].groupby("design_id")["n_seeds"].max()
    if counts.empty:
        return "No run can be compared."
    n_designs = f"{len(counts)} design{'s' if len(counts) > 1 else ''}"
    if counts.max() == 1:
        return f"{n_designs}, one seed each: no interval over seeds can be given."
    return f"{n_designs} of {_range(counts)} seeds each."


def dead_layers(metrics: pd.DataFrame) -> list[str]:
    """Sentences on rows in which nothing could be measured."""
    null = metrics.loc[metrics["status"] != "ok"]
    if null.empty:
        return []
    every = "all" if len(null) == len(metrics) else f"{len(null):,} of {len(metrics):,}"
    reasons = ", ".join(f"{reason} ({n:,})" for reason, n in _counts(null["status"]).items())
    return [
        f"In {every} rows of metrics (a row is a layer at a step) nothing could be measured: "
        f"{reasons}. They are blank in figures and left out of means."
    ]


def sampled_rows(metrics: pd.DataFrame) -> list[str]:
    """A sentence on how many rows have enough samples, where some have not."""
    counts = _counts(metrics["sampling"])
    if metrics.empty or counts.get(VERDICTS[0], 0) == counts.sum():
        return []
    told = ", ".join(f"{counts[each]:,} {each}" for each in VERDICTS if each in counts)
    return [
        f"Sampling, of {counts.sum():,} rows of metrics: {told}. By how far PR moves when it is "
        "extrapolated from halves to infinitely many samples (well up to 5%, under up to 20%), or "
        "where no halves were measured by N/D (well from 8, under from 2). Fewer samples lower PR "
        "and SE and raise EEE; monitor.n_tokens raises their number."
    ]


def outlying_rows(metrics: pd.DataFrame) -> list[str]:
    """Sentences on rows whose spectrum may be that of a few samples."""
    notes = []
    for site in SITES:
        found = np.flatnonzero(metrics["outliers"].str.contains(site, regex=False))
        if len(found):
            shares = metrics[f"top_share_{site}"].to_numpy(float)[found]
            place = int(np.argsort(np.nan_to_num(shares, nan=-1.0), kind="stable")[-1])
            worst = metrics.iloc[found[place]].to_dict()
            notes.append(
                f"In {len(found):,} of {len(metrics):,} rows of metrics a few samples may make the "
                f"spectrum of {site}. The worst, run {worst['run_id']}, layer {worst['layer']}, "
                f"step {worst['step']:,}: {describe_outliers(worst, site)}. The column outliers of "
                "load_metrics names them; monitor.skip_first leaves the first tokens out."
            )
    return notes


def _counts(texts: pd.Series) -> pd.Series:
    """How often there is each text; none that is not there, as of categories."""
    counts = texts.value_counts()
    return counts[counts > 0]


def _range(values: pd.Series) -> str:
    low, high = (f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}" for value in _ends(values))
    return low if low == high else f"{low} to {high}"


def _ends(values: pd.Series) -> tuple[float, float]:
    return float(values.min()), float(values.max())
