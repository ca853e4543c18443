"""NerVE: how FFN nonlinearities reshape the eigenspectrum of their features while a model trains.

The names of the package are listed in `__init__.pyi` and imported when they are first used, so that
reading stored runs needs neither torch nor Lightning.
"""

import lazy_loader

_listed, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name != "__version__":
        return _listed(name)
    from importlib.metadata import version  # reads the metadata of the installed package

    return version("nerve")
