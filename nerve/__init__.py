"""NerVE: how FFN nonlinearities reshape the eigenspectrum of their features while a model trains.

The names below are imported when first used: reading stored runs needs neither torch nor Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nerve.measurement import measure
    from nerve.results import load_metrics, load_runs, load_scalars, load_spectra

_HOMES = {
    "load_metrics": "nerve.results",
    "load_runs": "nerve.results",
    "load_scalars": "nerve.results",
    "load_spectra": "nerve.results",
    "measure": "nerve.measurement",
}

__all__ = ["load_metrics", "load_runs", "load_scalars", "load_spectra", "measure"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'nerve' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
