"""Claim 15 by a stored result of `python benchmarks/monitor.py`: no runs, no spectra."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from evidence import Evidence

from criteria.check import CoreCheck, Judged
from nerve.analysis.estimate import contrast


@dataclass(frozen=True)
class Benchmark(CoreCheck):
    """A check on a file beside the runs, `benchmarks/monitor.json`.

    The file has `started` (ISO 8601), `device`, `step_ms` (a step that is not measured) and
    `stall_ms` (a list: what each measurement adds to its step), of GPT-2 125M at 65,536 tokens
    per step.
    """

    def judge(self, evidence: Evidence) -> Judged:
        path = evidence.root.parent / self.sources[0]
        if not path.is_file():
            return Judged(self, None, None, None, None)
        result = json.loads(path.read_text("utf-8"))
        shares = 100 * np.asarray(result["stall_ms"], float) / (1000 * result["step_ms"])
        one = np.zeros(len(shares))
        estimate = contrast(1 - shares, one.astype(str), np.arange(len(shares)), {"0.0": 1.0})
        return Judged(self, self.sources[0], None, estimate, pd.Timestamp(result["started"]))
