"""The catalog of metrics: their names and properties, and the views that show them.

Every list of metrics in nerve derives from `CATALOG`: the columns that a run stores, what loggers
and sweepers receive, what is compared over runs and depth, and what tables and figures show. A new
metric is one function (with its line in `nerve.spectra.metrics`, or in `nerve.derived` if it is
computed from stored columns), one entry here, one line in the tables of docs/measurement.md, and
one test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nerve.sites_and_groups import SITES

SPREAD = ("se", "pr", "eee")
"""The metrics whose sampling error is estimated from halves."""

SAMPLES_PER_DIMENSION = 8
"""The smallest number of samples per dimension of the features, N/D, of a well sampled spectrum.
Measurements take as many by default."""

View = Literal["summary", "overview", "maps", "curves", "layers", "scatter", "tables", "depth"]
"""Where a metric is shown: in the summary at the end of a run; for one run, in its overview and its
maps over depth and time; for several, as curves over steps, over layers, and against the loss; in
tables; and by default in `metrics_by_depth`."""


@dataclass(frozen=True)
class Metric:
    """One metric, and its one or two columns.

    Attributes:
        column: the name of its column; with `{site}` in it, one column for each of `SITES`.
        short: the paper's short name.
        unit: the unit of its values, or the meaning of their extremes.
        title: its name in words.
        bounds: the range of its values.
        at_most, at_least: the limits of pre with rank r and width D, as functions of (r, D).
        neutral: the value that means that the nonlinearity changes nothing; None if there is none.
        flatter: the side of `neutral` on which the nonlinearity flattens the spectrum.
        is_ratio: whether it is shown on a logarithmic axis if its values span a wide range.
        stored: whether it is a column of the `metrics` table; otherwise `load_metrics` derives it.
        logged: whether loggers, callbacks and `objective` receive it.
        compared: whether `final_metrics` has it, averaged over layers, then over seeds.
        correlated: whether it is correlated with the loss by default.
        grouped: whether the `groups` table also has it, for sites and groups of samples.
        shown: the views that show it.
    """

    column: str
    short: str
    unit: str
    title: str
    bounds: tuple[float, float] = (0.0, math.inf)
    at_most: Callable[[float, float], float] | None = None
    at_least: Callable[[float, float], float] | None = None
    neutral: float | None = None
    flatter: Literal["above", "below"] = "above"
    is_ratio: bool = False
    stored: bool = True
    logged: bool = False
    compared: bool = False
    correlated: bool = False
    grouped: bool = False
    shown: tuple[View, ...] = ()

    @property
    def has_sites(self) -> bool:
        return "{site}" in self.column

    @property
    def columns(self) -> tuple[str, ...]:
        """`("pr_pre", "pr_post")`, or `("js",)`."""
        return tuple(map(self.at, SITES)) if self.has_sites else (self.column,)

    @property
    def label(self) -> str:
        """The short name with the unit, for an axis."""
        return f"{self.short} ({self.unit})"

    def at(self, site: str) -> str:
        """The column of a site."""
        return self.column.format(site=site)


CATALOG = (
    Metric(
        "se_{site}",
        "SE",
        "nats",
        "spectral entropy",
        at_most=lambda rank, dim: math.log(rank),
        logged=True,
        compared=True,
        correlated=True,
        grouped=True,
        shown=("summary", "overview", "curves", "scatter", "tables"),
    ),
    Metric(
        "exp_se_{site}",
        "exp(SE)",
        "dimensions",
        "directions of a flat spectrum of this entropy",
        bounds=(1.0, math.inf),
        is_ratio=True,
        stored=False,
        compared=True,
    ),
    Metric(
        "pr_{site}",
        "PR",
        "dimensions",
        "participation ratio",
        bounds=(1.0, math.inf),
        at_most=lambda rank, dim: rank,
        is_ratio=True,
        logged=True,
        compared=True,
        correlated=True,
        grouped=True,
        shown=("summary", "overview", "curves", "layers", "scatter", "tables"),
    ),
    Metric(
        "eee_{site}",
        "EEE",
        "0 flat, 1 one direction",
        "early enrichment",
        bounds=(0.0, 1.0),
        at_least=lambda rank, dim: 1 - rank / dim,
        logged=True,
        compared=True,
        correlated=True,
        grouped=True,
        shown=("summary", "overview", "curves", "scatter", "tables"),
    ),
    Metric(
        "js",
        "JS",
        "nats",
        "Jensen-Shannon divergence of pre and post",
        bounds=(0.0, math.log(2)),
        logged=True,
        compared=True,
        correlated=True,
        shown=("summary", "overview", "curves", "scatter", "tables", "depth"),
    ),
    Metric(
        "pr_gain",
        "PR gain",
        "post / pre",
        "gain of the participation ratio",
        neutral=1.0,
        is_ratio=True,
        stored=False,
        compared=True,
        correlated=True,
        shown=("summary", "maps", "layers", "scatter", "tables", "depth"),
    ),
    Metric(
        "delta_eee",
        "ΔEEE",
        "post - pre",
        "change of early enrichment",
        bounds=(-1.0, 1.0),
        neutral=0.0,
        flatter="below",
        stored=False,
        compared=True,
        correlated=True,
        shown=("maps", "tables", "depth"),
    ),
    Metric(
        "se_{site}_normalized",
        "SE / ln D",
        "0 one direction, 1 flat",
        "spectral entropy of its largest",
        bounds=(0.0, 1.0),
        stored=False,
    ),
    Metric(
        "pr_{site}_fraction",
        "PR / D",
        "share of D",
        "participation ratio of the width",
        bounds=(0.0, 1.0),
        stored=False,
        compared=True,
        shown=("depth",),
    ),
    Metric(
        "variance_{site}",
        "variance",
        "squared units of the features",
        "trace of the covariance",
        is_ratio=True,
        grouped=True,
    ),
    Metric(
        "pr_{site}_corrected",
        "PR corrected",
        "dimensions",
        "participation ratio without the bias of a finite sample",
        bounds=(1.0, math.inf),
        is_ratio=True,
        grouped=True,
    ),
    Metric(
        "variance_outside",
        "variance outside",
        "share of post's",
        "share of post's variance outside the span of pre",
        bounds=(0.0, 1.0),
        logged=True,
        compared=True,
        shown=("maps", "layers", "tables", "depth"),
    ),
    Metric(
        "largest_share_{site}",
        "largest share",
        "share of the variance",
        "share of the single sample that is farthest from the mean",
        bounds=(0.0, 1.0),
        shown=("tables",),
    ),
    Metric(
        "top_share_{site}",
        "top share",
        "share of the variance",
        "share of the farthest 0.1% of the samples together",
        bounds=(0.0, 1.0),
        shown=("tables",),
    ),
    Metric(
        "mean_share_{site}",
        "mean share",
        "share of the second moment",
        "share of the mean in the second moment",
        bounds=(0.0, 1.0),
        compared=True,
        shown=("tables", "depth"),
    ),
    Metric(
        "position_ratio_{site}",
        "position ratio",
        "times the mean",
        "mean squared distance from the mean at the position that is farthest",
        is_ratio=True,
        shown=("tables",),
    ),
    Metric(
        "rank_limit_{site}",
        "rank limit",
        "directions",
        "most directions that a spectrum of these samples and widths can have",
        stored=False,
    ),
)
"""All metrics. The stored ones are in the order of their columns, which never changes: a new one
comes after those that are stored already."""

_BY_COLUMN = {column: metric for metric in CATALOG for column in metric.columns}


def metric_of(column: str) -> Metric | None:
    """The metric that a column holds; None for one that holds none."""
    return _BY_COLUMN.get(column)


def columns_of(which: Callable[[Metric], bool]) -> tuple[str, ...]:
    """The columns of some of the metrics, in the order of the catalog."""
    return tuple(column for metric in CATALOG if which(metric) for column in metric.columns)


def shown_in(view: View) -> tuple[Metric, ...]:
    """The metrics that a view shows."""
    return tuple(metric for metric in CATALOG if view in metric.shown)


STORED = columns_of(lambda metric: metric.stored)
"""The columns of the `metrics` table that are measured."""

DERIVED = columns_of(lambda metric: not metric.stored)
"""The columns that `load_metrics` derives from these."""

MEASURED = columns_of(lambda metric: metric.logged)
"""The columns that loggers, callbacks and sweepers receive by name."""

COMPARED = columns_of(lambda metric: metric.compared)
"""The columns that comparisons average over layers and seeds."""

GROUPED = (
    *(metric.column.replace("_{site}", "") for metric in CATALOG if metric.grouped),
    *(f"{name}_spread" for name in SPREAD),
)
"""The columns of the `groups` table that are measured, each for one site: a metric, or its standard
error for N independent Gaussian samples, times √N."""

CORRELATED = columns_of(lambda metric: metric.correlated)
"""The columns that are correlated with the loss by default."""
