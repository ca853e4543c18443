"""A core check: its effect, its requirements, its outcome, and the null models that it passes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from evidence import Evidence, Sweep

from criteria.measured import Design, Measured, measure
from criteria.nulls import CHANCE, FIXED, Labels, permutations
from nerve.analysis.estimate import LEAST_DF, Estimate, Outcome, Reading, decide, read

COMMITTED = pd.Timestamp("2026-11-26T18:40:00Z")
"""Results of runs that began before this time, when the rule was committed, are exploratory."""


@dataclass(frozen=True)
class Scale:
    """The smallest runs that may decide, so that the initial transient does not."""

    n_layers: int
    d_model: int
    steps: int
    tokens: float

    def __str__(self) -> str:
        size = f"{self.n_layers} × {self.d_model}, {self.steps:,} steps"
        return f"{size}, {self.tokens / 1e6:,.0f}M"

    def reached(self, runs: Measured) -> bool:
        sizes = runs.runs[["model.n_layers", "model.d_model"]].min()
        enough = sizes["model.n_layers"] >= self.n_layers, sizes["model.d_model"] >= self.d_model
        return all(enough) and runs.steps[-1] >= self.steps and runs.tokens.min() >= self.tokens


@dataclass(frozen=True)
class CoreCheck:
    """One criterion of a claim, fixed before the runs that it judges.

    Attributes:
        id: the claim's number and a word.
        states: what must hold, in one sentence.
        effect: the quantity computed, positive in the direction of the claim, with its unit.
        estimate: computes it from the runs (for a benchmark, from its times).
        designs: all designs that are loaded, by name: the compared ones, and others whose errors
            are pooled with theirs.
        compared: the designs that the effect is about.
        sources: folders of runs, the preferred one first; see `judge`.
        labels: what the permutation permutes.
        seeds: required number of seeds of each compared design, or of points of a correlation or
            slope.
        scale: required scale.
        paper: the paper's value of the effect, in its unit.
        paper_value: the same as a number, if possible.
        smallest: the interval must lie above this value.
        why: why this effect was chosen.
        unit: what `seeds` counts.
        narrow: excludes runs that the question is not about, such as those at other rates.
        needs: a further requirement: its name, and whether runs meet it.
    """

    id: str
    states: str
    effect: str
    estimate: Callable[..., Estimate]
    designs: Mapping[str, Design]
    compared: tuple[str, ...]
    sources: tuple[str, ...]
    labels: Labels
    seeds: int
    scale: Scale
    paper: str
    paper_value: float | None = None
    smallest: float = 0.0
    why: str = ""
    unit: str = "seeds"
    narrow: Callable[[Sweep], Sweep] = lambda sweep: sweep
    needs: tuple[str, Callable[[Measured], bool]] | None = None

    @property
    def claim(self) -> int:
        return int(self.id.partition(".")[0])

    def judge(self, evidence: Evidence) -> "Judged":
        """The outcome on the first source that has everything the check requires; if none has, on
        the first with all compared designs; otherwise on none."""
        judged = list(self.on_each_source(evidence))
        whole = [each for each in judged if not each.missing]
        return [*whole, *judged, Judged(self, None, None, None, None, _none)][0]

    def on_each_source(self, evidence: Evidence) -> Iterator["Judged"]:
        """The outcome on each source with all compared designs, in order."""
        for source in self.sources:
            if source in evidence.names:
                judged = self.on(source, evidence.sweep(source))
                if judged is not None:
                    yield judged

    def on(self, source: str, sweep: Sweep) -> "Judged | None":
        """The outcome on the runs of one source; None if a compared design has no run."""
        runs = measure(self.narrow(sweep), self.designs)
        if runs is None or not all(runs.of([name]).any() for name in self.compared):
            return None
        first = runs.runs["started"].min()
        return Judged(self, source, runs, self.estimate(runs), first, self._permuted)

    def _permuted(self, judged: "Judged") -> Iterator[Estimate]:
        if judged.runs is not None:
            changed = permutations(judged.runs, self.labels, self.compared)
            yield from map(self.estimate, changed)


def _none(judged: "Judged") -> Iterator[Estimate]:
    return iter(())


@dataclass(frozen=True)
class Judged:
    """A check on the available runs; without any, it has no source, estimate and start.

    Attributes:
        source: the folder of the runs, or the file.
        runs: None for a file.
        started: the start of the first run.
        permuted: yields the estimates on permuted labels.
    """

    check: CoreCheck
    source: str | None
    runs: Measured | None
    estimate: Estimate | None
    started: pd.Timestamp | None
    permuted: Callable[["Judged"], Iterator[Estimate]]

    @property
    def reading(self) -> Reading | None:
        """What the interval alone says, regardless of what is missing."""
        return None if self.estimate is None else read(self.estimate, self.check.smallest)

    @property
    def missing(self) -> list[str]:
        """What the rule requires and these runs lack."""
        if self.estimate is None:
            return ["runs"]
        lacks = []
        if self.estimate.n_seeds < self.check.seeds:
            lacks.append(f"{self.check.unit} ({self.estimate.n_seeds} of {self.check.seeds})")
        if self.estimate.df < LEAST_DF:
            lacks.append(f"df ({self.estimate.df} of {LEAST_DF})")
        if self.runs is None:
            return lacks
        if not self.check.scale.reached(self.runs):
            lacks.append("scale")
        if self.check.needs is not None and not self.check.needs[1](self.runs):
            lacks.append(self.check.needs[0])
        return lacks

    @property
    def outcome(self) -> Outcome:
        if self.estimate is None:
            return "undecided"
        return decide(self.estimate, self.check.smallest, self.missing)

    @property
    def exploratory(self) -> bool:
        """Whether a run began before the rule."""
        return self.started is not None and self.started < COMMITTED

    @cached_property
    def passes_null(self) -> tuple[str, ...]:
        """The null models on which the check holds, regardless of what is missing."""
        passed = []
        if self.runs is not None:
            for name, functions in FIXED.items():
                changed = (self.check.estimate(function(self.runs)) for function in functions)
                if any(map(self._holds, changed)):
                    passed.append(name)
        if self.share_permuted > CHANCE:
            passed.append("permuted labels")
        return tuple(passed)

    @cached_property
    def share_permuted(self) -> float:
        """The share of permutations in which the check holds; 0 if none changes anything."""
        held = [self._holds(estimate) for estimate in self.permuted(self)]
        return sum(held) / len(held) if held else 0.0

    def _holds(self, estimate: Estimate) -> bool:
        """Whether the check holds on a null model that changes something it uses."""
        return estimate != self.estimate and read(estimate, self.check.smallest) == "holds"
