"""Warnings of what was left out, at the line of the user's that asked for it."""

import functools
import os
import sys
import warnings
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
_PASSED_OVER = (_PACKAGE, functools.__file__)  # the getter of a cached property is a frame, too


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside of this package, however deep the call that found it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
