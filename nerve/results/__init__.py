"""What a run leaves on disk and how it is read again: Parquet parts, `run.json`, pandas frames.

Nothing here imports torch, Lightning or Hydra, so that a notebook or a report starts at once.
"""

from nerve.results.find import FingerprintWarning, IncompleteWarning, find_runs
from nerve.results.identity import config_id, new_run_id
from nerve.results.parts import DamagedPartWarning
from nerve.results.record import DamagedRecordWarning, RunRecord
from nerve.results.runs import load_metrics, load_runs, load_scalars, load_spectra
from nerve.results.schema import METRICS, SCALARS, SPECTRA
from nerve.results.store import RunStore

__all__ = [
    "METRICS",
    "SCALARS",
    "SPECTRA",
    "DamagedPartWarning",
    "DamagedRecordWarning",
    "FingerprintWarning",
    "IncompleteWarning",
    "RunRecord",
    "RunStore",
    "config_id",
    "find_runs",
    "load_metrics",
    "load_runs",
    "load_scalars",
    "load_spectra",
    "new_run_id",
]
