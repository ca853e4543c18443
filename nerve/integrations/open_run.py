"""A run that stays open between callbacks, and is closed when the program ends without them."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from weakref import WeakValueDictionary

from nerve.errors import noted
from nerve.integrations.loop import WatchedLoop
from nerve.integrations.losses import StepLosses

_open: WeakValueDictionary[Path, "OpenRun"] = WeakValueDictionary()
"""The runs of this process that are open, by directory."""


class OpenRun:
    """The run of a callback, apart from it: what ends the program, or lets the callback go, ends
    the run."""

    def __init__(self) -> None:
        self.loop: WatchedLoop | None = None
        self.losses: StepLosses | None = None
        self._context: AbstractContextManager[WatchedLoop] | None = None

    def open(self, path: Path, context: AbstractContextManager[WatchedLoop]) -> WatchedLoop:
        """Enters what records the run in that directory."""
        self.loop = context.__enter__()
        self._context = context
        _open[path] = self
        return self.loop

    def close(self, error: BaseException | None) -> None:
        """Ends the run: done, or as the error says."""
        context, self._context, self.loop = self._context, None, None
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
        """Ends a run whose training did not come to its end, with the error that ended the program
        where that is known; nothing for one that is closed."""
        if self._context is not None:
            last = getattr(sys, "last_value", None)
            error = last or RuntimeError("Training ended before its last step, by an exception.")
            with noted(error):
                self.close(error)

    @staticmethod
    def give_up_in(path: Path) -> None:
        """Gives up the run in that directory that a training before has left open: what raised may
        keep its callback alive."""
        left = _open.pop(path, None)
        if left is not None:
            left.give_up()
