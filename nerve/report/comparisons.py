"""The comparisons of several runs, computed once for all figures and tables, and their figures."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd

from nerve.analysis.compare import average_seeds
from nerve.analysis.correlate import NULLS, correlate_within_runs
from nerve.analysis.correlate_across import correlate_across_runs
from nerve.analysis.early import rank_early
from nerve.analysis.factors import Factors, find_factors, is_number, ordered_levels
from nerve.analysis.load import Runs
from nerve.analysis.paired import compare_seeds
from nerve.analysis.partial import LEAST_POINTS
from nerve.report import figures_of_comparisons
from nerve.report.content import WINDOW_TEXTS, Drawing, limits, seeds

NULL_NAMES = {"clock": "the clock, log(step + 1)", "lr": "the learning rate"}

MAX_NULLS = 4
"""The most null models in a figure; the table has all."""

FILLED = "Filled points: the 95% interval excludes 0."


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of two or more runs, each computed on first access.

    Args:
        loaded: the runs.
        points: rows of `final_metrics` with the factors that vary.
        factors: the factors that vary among the runs.
    """

    loaded: Runs
    points: pd.DataFrame
    factors: Factors

    @cached_property
    def designs(self) -> pd.DataFrame:
        """Rows of `average_seeds`."""
        return average_seeds(self.points)

    @cached_property
    def within(self) -> pd.DataFrame:
        """Rows of `correlate_within_runs`."""
        loaded = self.loaded
        return correlate_within_runs(loaded.metrics, loaded.frame, self.factors.varying)

    @cached_property
    def numbers(self) -> list[str]:
        """The numeric factors, on which the loss may depend directly."""
        return [
            name
            for name in self.factors.varying
            if all(level is None or is_number(level) for level in ordered_levels(self.points[name]))
        ]

    @cached_property
    def across_designs(self) -> pd.DataFrame:
        """Rows of `correlate_across_runs`, one point per design."""
        return correlate_across_runs(self.designs, given=self.numbers)

    @cached_property
    def across_runs(self) -> pd.DataFrame:
        """Rows of `correlate_across_runs`, one point per run."""
        return correlate_across_runs(self.points, given=self.numbers)

    @cached_property
    def early(self) -> pd.DataFrame:
        """Rows of `rank_early`."""
        return rank_early(self.loaded.metrics, self.loaded.frame)

    @cached_property
    def contrasts(self) -> pd.DataFrame:
        """Rows of `compare_seeds` for each factor that varies among runs with a seed."""
        paired = self.points[(self.points["flag"] == "ok") & self.points["seed"].notna()]
        runs = self.loaded.frame[self.loaded.frame["run_id"].isin(paired["run_id"])]
        factors = find_factors(runs).varying if len(runs) else ()
        tables = [compare_seeds(paired, runs, name) for name in factors]
        return pd.concat(tables) if tables else pd.DataFrame(columns=["factor", "data", "ffn"])


def comparison_drawings(
    compared: Comparisons, window: str, factors: Sequence[str]
) -> Iterator[Drawing]:
    """Correlations and null models, early ranking, and contrasts by each of the factors."""
    yield from _within(compared, window)
    yield from _across(compared)
    yield from _early(compared)
    yield from _contrasts(compared, factors)


def within_drawings(
    correlations: pd.DataFrame, window: str, suffix: str, title: str, about: str
) -> Iterator[Drawing]:
    """Correlations within runs of one window and FFN, compared with those of the clock and the
    learning rate; no figure if there are too few steps for a partial r.

    Args:
        correlations: rows of `correlate_within_runs`.
        window: the window of these rows.
        suffix: suffix of the figure's name.
        title: title of the figure.
        about: the end of its caption.
    """
    if correlations["given_clock"].isna().all():
        return
    yield Drawing(
        f"nulls_within{suffix}",
        f"Correlation of each metric (mean over layers) with the validation loss over "
        f"{WINDOW_TEXTS[window]}, one point per run, and those of the clock, log(step + 1), and "
        "the learning rate (lines, median over runs). Right: partial correlations given each of "
        f"these, with 95% intervals over steps (block bootstrap). {FILLED} {about}",
        partial(figures_of_comparisons.beside_nulls, correlations, NULLS, NULL_NAMES, title),
    )


def _within(compared: Comparisons, window: str) -> Iterator[Drawing]:
    rows = compared.within
    rows = rows[(rows["flag"] == "ok") & (rows["window"] == window)]
    for own, group in _groups(compared, rows, ["ffn", "data"]):
        title = f"Metric and loss within runs{group.named}"
        yield from within_drawings(own, window, group.suffix, title, group.about)


def _across(compared: Comparisons) -> Iterator[Drawing]:
    nulls = ["clock", *compared.numbers][:MAX_NULLS]
    names = NULL_NAMES | {name: name for name in compared.numbers}
    rows = compared.across_designs
    known = rows[[f"r_{null}" for null in nulls]].notna().any(axis=1)
    for own, group in _groups(compared, rows[known], ["ffn", "data"]):
        title = f"Metric and loss across designs{group.named}"
        yield Drawing(
            f"nulls_across{group.suffix}",
            "Correlation of each metric with the final validation loss over designs (means over "
            "seeds, last measured step) with its 95% interval (Fisher), and those of the clock and "
            "of the varied factors (lines). Right: partial correlations given each of these, with "
            f"95% intervals (bootstrap over designs, from {LEAST_POINTS}). {FILLED} {group.about}",
            partial(figures_of_comparisons.beside_nulls, own, nulls, names, title),
        )


def _early(compared: Comparisons) -> Iterator[Drawing]:
    rows = compared.early
    rows = rows[rows["n_designs"] >= LEAST_POINTS]
    for own, group in _groups(compared, rows, ["ffn", "data", "schedule"]):
        title = f"Prediction of the final loss from early steps{group.named}"
        yield Drawing(
            f"early{group.suffix}",
            "Kendall's τ of each metric (mean over layers) at each measured step with the final "
            "loss, over runs of one schedule and budget "
            f"({own['schedule'].iloc[0] or 'not known'}; {own['n'].max()} runs of "
            f"{own['n_designs'].max()} designs); 95% bands by a bootstrap over designs. Blue: the "
            "partial τ given the loss at that step, which is what a metric adds to the loss. It is "
            "evidence only where its band excludes both 0 and the dotted line, the partial τ of a "
            f"noisy copy of the loss. {group.about}",
            partial(figures_of_comparisons.early_ranking, own, title),
        )


def _contrasts(compared: Comparisons, factors: Sequence[str]) -> Iterator[Drawing]:
    """Contrasts without intervals have no figure; the table has the differences."""
    for factor in factors:
        rows = compared.contrasts
        rows = rows[rows["factor"] == factor]
        for own, group in _groups(compared, rows, ["ffn", "data"]):
            if own["low"].isna().all():
                continue
            title = f"Paired by seed, {factor}{group.named}"
            yield Drawing(
                f"contrasts{group.suffix}_by_{factor}",
                f"Designs that differ only in {factor}, with runs paired by seed: differences of "
                "means with 95% intervals, where the error is pooled over all designs of one scale "
                f"(degrees of freedom: {_ends(own['df'])}; pairs: {_ends(own['n_pairs'])}). "
                f"{FILLED} Gray: undecided, with fewer than 3 degrees of freedom. With more than "
                f"{figures_of_comparisons.MAX_LEVELS} levels, each is compared with the first; "
                f"at most {figures_of_comparisons.MAX_CONTRASTS} pairs are shown. The table has "
                f"all. {group.about}",
                partial(figures_of_comparisons.contrasts, own, title),
            )


@dataclass(frozen=True)
class _Group:
    """How a figure's name, title and caption describe the rows of one FFN and data."""

    suffix: str
    named: str
    about: str


def _groups(
    compared: Comparisons, rows: pd.DataFrame, by: Sequence[str]
) -> Iterator[tuple[pd.DataFrame, _Group]]:
    """The rows of each group."""
    metrics = compared.loaded.metrics
    groups = list(rows.groupby(list(by), dropna=False, sort=False, observed=True))
    places: Counter[Hashable] = Counter()
    for (ffn, data, *_), own in groups:
        place, places[ffn] = places[ffn], places[ffn] + 1
        several = sum(other == ffn for (other, *_), _ in groups) > 1
        kind = "" if ffn == "ffn" else str(ffn)
        suffix = [kind, str(place) if several else ""]
        named = [kind, f"data {data}" if rows["data"].nunique(dropna=False) > 1 else ""]
        designs = compared.designs[compared.designs["ffn"] == ffn]
        about = f"{limits(metrics[metrics['ffn'] == ffn])} {seeds(designs)}"
        yield own, _Group(_joined("_", suffix), _joined(", ", named), about)


def _joined(mark: str, parts: Sequence[str]) -> str:
    """The nonempty parts, each with the mark before it."""
    return "".join(f"{mark}{part}" for part in parts if part)


def _ends(values: pd.Series) -> str:
    low, high = f"{values.min():,}", f"{values.max():,}"
    return low if low == high else f"{low} to {high}"
