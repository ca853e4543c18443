"""Errors that a user can fix, and warnings that point to the user's line of code.

The message of an error gives the rule, what was received and the likely fix.
"""

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = str(Path(__file__).resolve().parent) + os.sep
_PASSED_OVER = (_PACKAGE, functools.__file__)  # the getter of a cached property is a frame, too


class NerveError(Exception):
    """Base of all errors that the command line shows as one message, without a traceback."""


class ConfigError(NerveError):
    """A configuration value, or a combination of values, that cannot be run."""


class DataError(NerveError):
    """A corpus, image archive, tokenizer or token cache that cannot be used."""


class StoreError(NerveError):
    """A run directory or a stored file that cannot be read or written."""


class MeasurementError(NerveError):
    """Features that were captured wrongly, not at all or twice, or an impossible spectrum."""


class NotFiniteError(MeasurementError):
    """Features with NaN in every sample, which show no dependence."""


class DivergedError(NerveError):
    """The training loss became NaN or infinite."""


class DeviceError(NerveError):
    """A GPU failed, or has not enough memory."""


class NotGatheredError(NerveError):
    """Another process of the run failed to start or ended, with or without a reason."""


class StoppedError(NotGatheredError):
    """Another process of the run was asked to stop, and has stopped."""


@contextmanager
def noted(error: BaseException) -> Iterator[None]:
    """Adds an exception raised within the `with` block to `error` as a note, because `error` is
    being raised and is more informative. Interrupts and exits are not caught."""
    try:
        yield
    except Exception as late:
        error.add_note(f"Then, as the run ended: {type(late).__name__}: {late}")


def with_notes(error: BaseException) -> str:
    """The message of an error and its notes, each on a line of its own."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its final period, for a message that quotes it;
    the name of the error's class if it has no message. Messages of torch continue with a stack
    trace of C++, others with a log."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".")


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line outside of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED_OVER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
