"""What is computed once for the figures and tables of several runs, and the figures of it."""

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pandas as pd

from nerve.analysis.compare import average_seeds
from nerve.analysis.correlate import NULLS, correlate_across_runs, correlate_within_runs
from nerve.analysis.early import rank_early
from nerve.analysis.factors import Factors, find_factors, is_number, ordered_levels
from nerve.analysis.load import Runs
from nerve.analysis.paired import compare_seeds
from nerve.analysis.partial import LEAST_POINTS
from nerve.report import figures_of_comparisons
from nerve.report.content import WINDOW_TEXTS, Drawing, limits, seeds

NULL_NAMES = {"clock": "the clock, log(step + 1)", "lr": "the learning rate"}

MAX_NULLS = 4
"""Null models in a figure; the table has all."""

FILLED = "Filled: the 95% interval leaves out 0."


@dataclass(frozen=True)
class Comparisons:
    """The comparisons of two or more runs, each made when it is first asked for.

    Args:
        loaded: the runs.
        points: rows of `final_metrics` with the factors that vary.
        factors: what varies among the runs.
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
        """The factors that are numbers, of which the loss may be a function."""
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
    """Correlations beside null models, early ranking, and contrasts by each of the factors."""
    yield from _within(compared, window)
    yield from _across(compared)
    yield from _early(compared)
    yield from _contrasts(compared, factors)


def within_drawings(
    correlations: pd.DataFrame, window: str, suffix: str, title: str, about: str
) -> Iterator[Drawing]:
    """Correlations within runs of one window and FFN beside the clock and the learning rate; none
    where there are too few steps for a partial r.

    Args:
        correlations: rows of `correlate_within_runs`.
        window: theirs.
        suffix: of the figure's name.
        title: of the figure.
        about: the end of its caption.
    """
    if correlations["given_clock"].isna().all():
        return
    yield Drawing(
        f"nulls_within{suffix}",
        f"Correlation of each metric (mean over layers) with the validation loss over "
        f"{WINDOW_TEXTS[window]}, one point per run, and that of the clock, log(step + 1), and of "
        "the learning rate by themselves (lines, median over runs). Right: what is left given "
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
            "seeds, last measured step) with its 95% interval (Fisher), and that of what was "
            "varied by itself (lines). Right: what is left given it, with 95% intervals (bootstrap "
            f"over designs, from {LEAST_POINTS}). {FILLED} {group.about}",
            partial(figures_of_comparisons.beside_nulls, own, nulls, names, title),
        )


def _early(compared: Comparisons) -> Iterator[Drawing]:
    rows = compared.early
    rows = rows[rows["n_designs"] >= LEAST_POINTS]
    for own, group in _groups(compared, rows, ["ffn", "data", "schedule"]):
        title = f"What an early step says of the final loss{group.named}"
        yield Drawing(
            f"early{group.suffix}",
            "Kendall's τ of each metric (mean over layers) at each measured step with the final "
            "loss, over runs of one schedule and budget "
            f"({own['schedule'].iloc[0] or 'not known'}; {own['n'].max()} runs of "
            f"{own['n_designs'].max()} designs); 95% bands by a bootstrap over designs. Blue is "
            "what a metric adds to the loss at that step: the partial τ. It says something where "
            "its band leaves out both 0 and the dotted line, which is what a noisy copy of the "
            f"loss would have. {group.about}",
            partial(figures_of_comparisons.early_ranking, own, title),
        )


def _contrasts(compared: Comparisons, factors: Sequence[str]) -> Iterator[Drawing]:
    """None of what has no interval: the table has the differences."""
    for factor in factors:
        rows = compared.contrasts
        rows = rows[rows["factor"] == factor]
        for own, group in _groups(compared, rows, ["ffn", "data"]):
            if own["low"].isna().all():
                continue
            title = f"Paired by seed, {factor}{group.named}"
            yield Drawing(
                f"contrasts{group.suffix}_by_{factor}",
                f"Designs that differ in {factor} alone, runs paired by seed: differences of means "
                "with 95% intervals, the error pooled over all designs of one scale "
                f"({_ends(own['df'])} degrees of freedom; {_ends(own['n_pairs'])} pairs). "
                f"{FILLED} Gray: less than 3 degrees of freedom decide nothing. Of more than "
                f"{figures_of_comparisons.MAX_LEVELS} levels each is drawn against the first, and "
                f"at most {figures_of_comparisons.MAX_CONTRASTS} pairs; the table has all. "
                f"{group.about}",
                partial(figures_of_comparisons.contrasts, own, title),
            )


@dataclass(frozen=True)
class _Group:
    """What is said of the rows of one FFN and data: in a figure's name, title and caption."""

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
    """Each part that there is, with the mark before it."""
    return "".join(f"{mark}{part}" for part in parts if part)


def _ends(values: pd.Series) -> str:
    low, high = f"{values.min():,}", f"{values.max():,}"
    return low if low == high else f"{low} to {high}"
