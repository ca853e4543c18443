"""Claim 15 by a stored result of `python benchmarks/monitor.py`: no runs, no spectra."""

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
    """A check on a file beside the runs, `benchmarks/monitor.json`.

    The file has `started` (ISO 8601), `device`, `step_ms` (a step that is not measured),
    `stall_ms` (a list: what each measurement adds to the steps up to the next) and `between_ms`
    (what of that the later half of these steps has, far from a measurement), of GPT-2 125M at
    65,536 tokens per step.
    """

    def on_each_source(self, evidence: Evidence) -> Iterator[Judged]:
        """On the file, where there is one."""
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
    """The lesser of 1 less the share of training at every 1000 steps, in percent, and of what
    measured steps take beyond others. Both are in steps, shape (measurement,)."""
    design, number = np.full(len(stall), "measured"), np.arange(len(stall))
    effects = (1 - 100 * stall / 1000, stall - between)
    return lowest([contrast(effect, design, number, {"measured": 1.0}) for effect in effects])
