"""Packages that only some data need."""

from importlib import import_module
from types import ModuleType

from nerve.errors import DataError


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, or says which of this package's extras brings it.

    Raises:
        DataError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {module.partition('.')[0]}, which cannot be imported "
            f'({error}). In the checkout of nerve: pip install -c constraints.txt -e ".[{extra}]"'
        ) from error
