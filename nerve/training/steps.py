"""Takes the features of a module's own steps, and not of other calls of the module."""

from collections.abc import Callable
from typing import Any, NamedTuple

import lightning as L

from nerve.measuring.choice import Choice
from nerve.recording.recorder import Recorder

STEPS = ("training_step", "validation_step")
"""The methods of a strategy through which Lightning runs a module's steps."""


class _Awaited(NamedTuple):
    """A batch whose step is to be measured."""

    batch: Any


class StepFeatures:
    """Takes the features of a step from its beginning to its end.

    Before and after a step, Lightning calls hooks of callbacks and of the module, which may run the
    model themselves. Therefore the strategy's methods that run the steps are wrapped.

    Args:
        trainer: the trainer of the fit.
        recorder: an open recorder, which takes the features.
        choice: determines which samples of a batch count.
    """

    def __init__(self, trainer: L.Trainer, recorder: Recorder, choice: Choice) -> None:
        self._strategy: Any = trainer.strategy
        self._recorder = recorder
        self._choice = choice
        self._awaited: _Awaited | None = None
        self._is_taking = False
        own = vars(self._strategy)
        self._replaced = {name: own.get(name) for name in STEPS}  # of other code that wraps them
        for name in STEPS:
            setattr(self._strategy, name, self._measured(getattr(self._strategy, name)))

    def expect(self, batch: Any) -> None:
        """Makes the next step, that of this batch, a measured one."""
        self._awaited = _Awaited(batch)

    def stop(self) -> None:
        """Stops taking features before the step ends, because its forward pass is over."""
        if self._is_taking:
            self._is_taking = False
            self._recorder.stop()

    def end(self) -> None:
        """Ends a batch. Raises `MeasurementError` if its step was to be measured but never ran, as
        for a step that runs no FFN."""
        self._start()
        self.stop()

    def close(self) -> None:
        """Restores the strategy; may be called at any time."""
        self._awaited, self._is_taking = None, False
        for name, before in self._replaced.items():
            if before is None:
                vars(self._strategy).pop(name, None)
            else:
                setattr(self._strategy, name, before)
        self._replaced.clear()

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
            with self._recorder.clock:
                self._recorder.start(self._choice.of(awaited.batch))
            self._is_taking = True
