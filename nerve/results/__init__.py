"""What a run leaves on disk and how it is read again: Parquet parts, `run.json`, pandas frames.

Nothing here imports torch, Lightning or Hydra, so that a notebook or a report starts at once.
"""

from typing import TYPE_CHECKING

from nerve.lazy import lazy

if TYPE_CHECKING:
    from nerve.results.compare import average_seeds, final_metrics, metrics_at_loss
    from nerve.results.correlate import correlate_across_runs, correlate_within_runs
    from nerve.results.depth import depth_means, metrics_by_depth
    from nerve.results.find import FingerprintWarning, IncompleteWarning, find_runs
    from nerve.results.flags import flag_runs
    from nerve.results.identity import config_id, new_run_id
    from nerve.results.parts import DamagedPartWarning
    from nerve.results.record import DamagedRecordWarning, RunRecord
    from nerve.results.runs import load_metrics, load_runs, load_scalars, load_spectra
    from nerve.results.scaling import fit_width_scaling
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
    "average_seeds",
    "config_id",
    "correlate_across_runs",
    "correlate_within_runs",
    "depth_means",
    "final_metrics",
    "find_runs",
    "fit_width_scaling",
    "flag_runs",
    "load_metrics",
    "load_runs",
    "load_scalars",
    "load_spectra",
    "metrics_at_loss",
    "metrics_by_depth",
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
        "average_seeds": "nerve.results.compare",
        "config_id": "nerve.results.identity",
        "correlate_across_runs": "nerve.results.correlate",
        "correlate_within_runs": "nerve.results.correlate",
        "depth_means": "nerve.results.depth",
        "final_metrics": "nerve.results.compare",
        "find_runs": "nerve.results.find",
        "fit_width_scaling": "nerve.results.scaling",
        "flag_runs": "nerve.results.flags",
        "load_metrics": "nerve.results.runs",
        "load_runs": "nerve.results.runs",
        "load_scalars": "nerve.results.runs",
        "load_spectra": "nerve.results.runs",
        "metrics_at_loss": "nerve.results.compare",
        "metrics_by_depth": "nerve.results.depth",
        "new_run_id": "nerve.results.identity",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
