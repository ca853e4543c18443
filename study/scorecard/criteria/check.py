"""A core check: what it computes, what it asks for, its outcome, and the nulls that it passes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
from evidence import Evidence, Sweep

from criteria.measured import Design, Measured, measure
from criteria.nulls import CHANCE, FIXED, Labels, permutations
from nerve.analysis.estimate import LEAST_DF, Estimate, Outcome, Reading, decide, read

COMMITTED = pd.Timestamp("2026-11-26T18:40:00Z")
"""A run that began before is older than the rule: what it says is exploratory."""


@dataclass(frozen=True)
class Scale:
    """The least that runs must have, so that the first transient does not decide."""

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
        effect: what is computed, positive as the claim says; with its unit.
        estimate: computes it, from the runs (of a benchmark, from its times).
        designs: all that are loaded, by name: those compared and those whose errors are pooled.
        compared: the designs that the effect is about.
        sources: folders of runs, the most telling first; see `judge`.
        labels: what the permutation permutes.
        seeds: asked for in each compared design, or how many points of a correlation or slope.
        scale: asked for.
        paper: the paper's value of the effect, in its unit.
        paper_value: the same as a number, where it can be one.
        smallest: the interval must lie above it.
        why: why this and not another effect.
        unit: what `seeds` counts.
        narrow: leaves out runs that the question does not mean, such as those of other rates.
        needs: a further requirement: its name, and whether runs have it.
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
        """The outcome on the first source that has all that the check asks for; where none has, on
        the first that has all compared designs, else on none."""
        judged = list(self.on_each_source(evidence))
        whole = [each for each in judged if not each.missing]
        return [*whole, *judged, Judged(self, None, None, None, None, _none)][0]

    def on_each_source(self, evidence: Evidence) -> Iterator["Judged"]:
        """On every source that has all compared designs, in their order."""
        for source in self.sources:
            if source in evidence.names:
                judged = self.on(source, evidence.sweep(source))
                if judged is not None:
                    yield judged

    def on(self, source: str, sweep: Sweep) -> "Judged | None":
        """On runs of one source; None where a compared design has none."""
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
    """A check on what is at hand; all are None where nothing is.

    Attributes:
        source: the folder of the runs, or the file.
        runs: None for a file.
        started: when the first of them began.
        permuted: gives the estimates on permuted labels.
    """

    check: CoreCheck
    source: str | None
    runs: Measured | None
    estimate: Estimate | None
    started: pd.Timestamp | None
    permuted: Callable[["Judged"], Iterator[Estimate]]

    @property
    def reading(self) -> Reading | None:
        """What the interval says, whatever is missing."""
        return None if self.estimate is None else read(self.estimate, self.check.smallest)

    @property
    def missing(self) -> list[str]:
        """What the rule asks for and these runs lack."""
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
        """Whether a run is older than the rule."""
        return self.started is not None and self.started < COMMITTED

    @cached_property
    def passes_null(self) -> tuple[str, ...]:
        """The null models on which the check holds, whatever is missing."""
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
        """The share of permutations in which the check holds; 0 where none changes anything."""
        held = [self._holds(estimate) for estimate in self.permuted(self)]
        return sum(held) / len(held) if held else 0.0

    def _holds(self, estimate: Estimate) -> bool:
        """On a null model, unless the check looks at nothing that it changes."""
        return estimate != self.estimate and read(estimate, self.check.smallest) == "holds"
