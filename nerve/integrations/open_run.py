"""A run that stays open between callbacks, and is closed if the program ends without calling
them."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from weakref import WeakValueDictionary

from nerve.errors import noted
from nerve.integrations.loop import WatchedLoop
from nerve.integrations.losses import StepLosses

_open: WeakValueDictionary[Path, "OpenRun"] = WeakValueDictionary()
"""The open runs of this process, by directory."""


def restore_nothing() -> None:
    """For a run that changed no settings of the caller."""


class OpenRun:
    """The run of a callback, kept separately from it, so that it ends when the program ends or the
    callback is garbage-collected."""

    def __init__(self) -> None:
        self.loop: WatchedLoop | None = None
        self.losses: StepLosses | None = None
        self.restore: Callable[[], None] = restore_nothing
        """Restores the settings of the caller that were changed for the run; called at its end, and
        may be called before."""
        self._context: AbstractContextManager[WatchedLoop] | None = None

    def open(self, path: Path, context: AbstractContextManager[WatchedLoop]) -> WatchedLoop:
        """Enters the context that records the run in that directory."""
        self.loop = context.__enter__()
        self._context = context
        _open[path] = self
        return self.loop

    def close(self, error: BaseException | None) -> None:
        """Ends the run: as done, or with the error."""
        context, self._context, self.loop = self._context, None, None
        self.restore()
        if self.losses is not None:
            self.losses.close()
            self.losses = None
        if context is None:
            return
        if error is None:
            context.__exit__(None, None, None)
        else:
            context.__exit__(type(error), error, error.__traceback__)

    def give_up(self) -> None:
        """Ends a run whose training did not finish, with the error that ended the program if known;
        does nothing for a closed run."""
        if self._context is not None:
            last = getattr(sys, "last_value", None)
            error = last or RuntimeError("An exception ended training before its last step.")
            with noted(error):
                self.close(error)

    @staticmethod
    def give_up_in(path: Path) -> None:
        """Gives up the run that an earlier training has left open in that directory: its exception
        may keep its callback alive."""
        left = _open.pop(path, None)
        if left is not None:
            left.give_up()
