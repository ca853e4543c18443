"""NerVE: how FFN nonlinearities reshape the eigenspectrum of their features while a model trains.

Reading stored runs needs neither torch nor Lightning: names are imported when first used.
"""

from typing import TYPE_CHECKING

from nerve.lazy import lazy

if TYPE_CHECKING:
    from nerve.measurement import measure
    from nerve.results.runs import load_metrics, load_runs, load_scalars, load_spectra

__all__ = ["load_metrics", "load_runs", "load_scalars", "load_spectra", "measure"]

__getattr__ = lazy(
    __name__,
    {
        "load_metrics": "nerve.results.runs",
        "load_runs": "nerve.results.runs",
        "load_scalars": "nerve.results.runs",
        "load_spectra": "nerve.results.runs",
        "measure": "nerve.measurement",
    },
)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
