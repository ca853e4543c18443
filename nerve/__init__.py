"""NerVE: how FFN nonlinearities reshape the eigenspectrum of their features while a model trains.

The names of the package are listed in `__init__.pyi` and imported when they are first used, so that
reading stored runs needs neither torch nor Lightning.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
