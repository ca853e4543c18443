"""Packages that only some data sets need."""

from importlib import import_module
from types import ModuleType

from nerve.errors import DataError


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports `module`, or raises an error that names the extra of nerve which installs it.

    Raises:
        DataError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"{purpose} needs the package {module.partition('.')[0]}, which cannot be imported "
            f'({error}). In the nerve checkout, run pip install -c constraints.txt -e ".[{extra}]"'
        ) from error
