"""Takes the features of a module's own steps, and of nothing else that runs the module."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L

from nerve.measuring.choice import Choice
from nerve.recording.recorder import Recorder

STEPS = ("training_step", "validation_step")
"""What Lightning asks a strategy for."""


class _Awaited(NamedTuple):
    """A batch whose step is to be measured."""

    batch: Any


class StepFeatures:
    """Takes the features of a step from its beginning to its end.

    Lightning calls hooks of callbacks and of the module before and after a step, which may run the
    model themselves. So the step itself is wrapped, where Lightning asks its strategy for it.

    Args:
        trainer: of the fit.
        recorder: open; takes the features.
        choice: which samples of a batch count.
    """

    def __init__(self, trainer: L.Trainer, recorder: Recorder, choice: Choice) -> None:
        self._strategy: Any = trainer.strategy
        self._recorder = recorder
        self._choice = choice
        self._awaited: _Awaited | None = None
        self._is_taking = False
        for name in STEPS:
            setattr(self._strategy, name, self._measured(getattr(self._strategy, name)))

    def expect(self, batch: Any) -> None:
        """Has the next step measured, which is that of this batch."""
        self._awaited = _Awaited(batch)

    def stop(self) -> None:
        """Ends a step that is measured before its end: what follows is not its forward pass."""
        if self._is_taking:
            self._is_taking = False
            self._recorder.stop()

    def end(self) -> None:
        """Ends a batch. Raises `MeasurementError` where its step was to be measured and never came,
        as for one that has run no FFN."""
        self._start()
        self.stop()

    def close(self) -> None:
        """Lets the strategy alone; allowed at any time."""
        self._awaited, self._is_taking = None, False
        for name in STEPS:
            vars(self._strategy).pop(name, None)

    def _measured(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            self._start()
            output = step(*args, **kwargs)
            self.stop()
            return output

        return measured

    def _start(self) -> None:
        awaited, self._awaited = self._awaited, None
        if awaited is not None:
            self._recorder.start(self._choice.of(awaited.batch))
            self._is_taking = True
