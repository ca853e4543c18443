"""Claim 15, judged by a stored result of `python benchmarks/monitor.py` instead of runs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product

import numpy as np
import pandas as pd
from evidence import Evidence

from criteria.check import CoreCheck, Judged
from criteria.effects import lowest
from criteria.nulls import N_PERMUTATIONS
from nerve.analysis.estimate import Estimate, contrast


@dataclass(frozen=True)
class Benchmark(CoreCheck):
    """A check on the file `benchmarks/monitor.json`, instead of runs.

    The file has `started` (ISO 8601), `device`, `step_ms` (the time of an unmeasured step),
    `stall_ms` (a list: the time that each measurement adds to the steps up to the next one) and
    `between_ms` (the part of it in the later half of these steps, far from a measurement), of GPT-2
    125M at 65,536 tokens per step.
    """

    def on_each_source(self, evidence: Evidence) -> Iterator[Judged]:
        """Judges the file, if it exists."""
        path = evidence.root.parent / self.sources[0]
        if not path.is_file():
            return
        result = json.loads(path.read_text("utf-8"))
        stall, between = (
            np.asarray(result[name], float) / result["step_ms"]
            for name in ("stall_ms", "between_ms")
        )

        def permuted(_: Judged) -> Iterator[Estimate]:
            changes = product([False, True], repeat=len(stall))
            for change in islice(changes, 1, 1 + N_PERMUTATIONS):
                yield self.estimate(
                    np.where(change, between, stall), np.where(change, stall, between)
                )

        started = pd.Timestamp(result["started"])
        yield Judged(self, self.sources[0], None, self.estimate(stall, between), started, permuted)


def small_and_seen(stall: np.ndarray, between: np.ndarray) -> Estimate:
    """The smaller of two effects: 1 minus the share of the training time at every 1000 steps, in
    percent, and the additional time of measured steps. Both arguments are in steps, shape
    (measurement,)."""
    design, number = np.full(len(stall), "measured"), np.arange(len(stall))
    effects = (1 - 100 * stall / 1000, stall - between)
    return lowest([contrast(effect, design, number, {"measured": 1.0}) for effect in effects])
