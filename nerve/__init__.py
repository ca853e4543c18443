"""NerVE: how FFN nonlinearities reshape the eigenspectrum of their features while a model trains.

Reading stored runs needs neither torch nor Lightning: names are imported when first used.
"""

from typing import TYPE_CHECKING

from nerve.lazy import lazy

if TYPE_CHECKING:
    from nerve.checkpoint import load_model
    from nerve.measurement import measure
    from nerve.results.compare import average_seeds, final_metrics, metrics_at_loss
    from nerve.results.correlate import correlate_across_runs, correlate_within_runs
    from nerve.results.depth import depth_means, metrics_by_depth
    from nerve.results.flags import flag_runs
    from nerve.results.runs import load_metrics, load_runs, load_scalars, load_spectra
    from nerve.results.scaling import fit_width_scaling

__all__ = [
    "average_seeds",
    "correlate_across_runs",
    "correlate_within_runs",
    "depth_means",
    "final_metrics",
    "fit_width_scaling",
    "flag_runs",
    "load_metrics",
    "load_model",
    "load_runs",
    "load_scalars",
    "load_spectra",
    "measure",
    "metrics_at_loss",
    "metrics_by_depth",
]

__getattr__ = lazy(
    __name__,
    {
        "average_seeds": "nerve.results.compare",
        "correlate_across_runs": "nerve.results.correlate",
        "correlate_within_runs": "nerve.results.correlate",
        "depth_means": "nerve.results.depth",
        "final_metrics": "nerve.results.compare",
        "fit_width_scaling": "nerve.results.scaling",
        "flag_runs": "nerve.results.flags",
        "load_metrics": "nerve.results.runs",
        "load_model": "nerve.checkpoint",
        "load_runs": "nerve.results.runs",
        "load_scalars": "nerve.results.runs",
        "load_spectra": "nerve.results.runs",
        "measure": "nerve.measurement",
        "metrics_at_loss": "nerve.results.compare",
        "metrics_by_depth": "nerve.results.depth",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
