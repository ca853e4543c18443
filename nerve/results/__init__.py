"""What a run leaves on disk and how it is read again: Parquet parts, `run.json`, pandas frames.

Nothing here imports torch, Lightning or Hydra, so that a notebook or a report starts at once.
"""

from typing import TYPE_CHECKING

from nerve.lazy import lazy

if TYPE_CHECKING:
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

__getattr__ = lazy(
    __name__,
    {
        "DamagedPartWarning": "nerve.results.parts",
        "DamagedRecordWarning": "nerve.results.record",
        "FingerprintWarning": "nerve.results.find",
        "IncompleteWarning": "nerve.results.find",
        "METRICS": "nerve.results.schema",
        "RunRecord": "nerve.results.record",
        "RunStore": "nerve.results.store",
        "SCALARS": "nerve.results.schema",
        "SPECTRA": "nerve.results.schema",
        "config_id": "nerve.results.identity",
        "find_runs": "nerve.results.find",
        "load_metrics": "nerve.results.runs",
        "load_runs": "nerve.results.runs",
        "load_scalars": "nerve.results.runs",
        "load_spectra": "nerve.results.runs",
        "new_run_id": "nerve.results.identity",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
