"""What the runs say about a claim in addition to its core checks: earlier criteria, and tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from evidence import Evidence, Sweep
from wording import Values, loss, spread

Outcome = Literal["yes", "no", "one seed", "not run"]
"""Whether a criterion holds; the last two say why it cannot be decided."""


@dataclass(frozen=True)
class Check:
    """One criterion of a claim.

    Attributes:
        criterion: what must hold, in words.
        paper: what the paper reports.
        measured: what these runs gave.
        holds: the outcome.
    """

    criterion: str
    paper: str
    measured: str
    holds: Outcome


@dataclass(frozen=True)
class Table:
    """Further numbers, as text."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Finding:
    """What the runs say about a claim.

    Attributes:
        measured: the main numbers, to compare with the paper's.
        scale, seeds: of the runs that the checks are about.
        checks: one per criterion.
        tables: further numbers.
    """

    measured: str
    scale: str
    seeds: str
    checks: Sequence[Check]
    tables: Sequence[Table] = ()

    @classmethod
    def of(
        cls, measured: str, sweep: Sweep, checks: Sequence[Check], tables: Sequence[Table]
    ) -> "Finding":
        """A finding with the scale and the seeds of the runs of `sweep`."""
        return cls(measured, sweep.scale(), sweep.seeds(), checks, tables)


NOT_RUN = Finding("–", "–", "–", ())


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        number: as the sweeps count them.
        statement: in one sentence.
        short: in at most eight words.
        paper: the main numbers that it reports.
        sweeps: the sweeps that are required to judge it.
        judge: judges it from these.
        figure: the name of its figure, empty for none.
    """

    number: int
    statement: str
    short: str
    paper: str
    sweeps: tuple[str, ...]
    judge: Callable[[Evidence], Finding]
    figure: str = ""

    def find(self, evidence: Evidence) -> Finding:
        """What the runs say, or `NOT_RUN` if they are missing."""
        return self.judge(evidence) if evidence.has(self.sweeps) else NOT_RUN


def beyond_noise(greater: Values, less: Values) -> Outcome:
    """Whether each seed of the one design is above each of the other: their ranges do not overlap.

    Three seeds against three do so by chance in one case of 20. One seed decides nothing.
    """
    both = (greater, less)
    return decided(both, all(map(len, both)) and min(greater) > max(less))


def decided(samples: Iterable[Values], holds: bool | np.bool_) -> Outcome:
    """The outcome of a check that compares means of several designs over several seeds."""
    n_seeds = min(map(len, samples))
    return outcome(holds) if n_seeds > 1 else "one seed" if n_seeds else "not run"


def descending(samples: Mapping[str, Values]) -> list[str]:
    """Designs by their mean, the highest first; empty if one has no run."""
    if not all(map(len, samples.values())):
        return []
    return sorted(samples, key=lambda level: -float(np.mean(samples[level])))


def outcome(holds: bool | np.bool_) -> Outcome:
    """`yes` or `no`."""
    return "yes" if holds else "no"


def above(
    criterion: str,
    paper: str,
    greater: tuple[str, Values],
    less: tuple[str, Values],
    *,
    wording: Callable[[Values], str] = spread,
) -> Check:
    """A check that one design is above another beyond seed noise; each is given with its name."""
    measured = ", ".join(f"{name} {wording(values)}" for name, values in (greater, less))
    return Check(criterion, paper, measured, beyond_noise(greater[1], less[1]))


def lower_loss(
    criterion: str, paper: str, lower: tuple[str, Values], higher: tuple[str, Values]
) -> Check:
    """A check that the loss of one design is below another's beyond seed noise."""
    measured = ", ".join(f"{name} {loss(values)}" for name, values in (lower, higher))
    return Check(criterion, paper, measured, beyond_noise(higher[1], lower[1]))


def counted(criterion: str, paper: str, holds: Sequence[bool] | pd.Series) -> Check:
    """A check that must hold in every case, of at least two; reports in how many it holds."""
    if not len(holds):
        return Check(criterion, paper, "–", "not run")
    n_held = sum(bool(case) for case in holds)
    holds_always = "one seed" if len(holds) == 1 else outcome(n_held == len(holds))
    return Check(criterion, paper, f"{n_held} of {len(holds)}", holds_always)
