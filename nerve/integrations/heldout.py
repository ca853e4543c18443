"""Held-out batches, measured between the steps of an external training loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from nerve.config import require
from nerve.measuring.choice import Choice, call_measured
from nerve.measuring.forward import evaluating
from nerve.recording.cadence import loss_of
from nerve.recording.recorder import Recorder

Forward = Callable[[nn.Module, Any], object]
"""Runs a model on one batch."""


def batches_of(given: Iterable[Any]) -> list[Any]:
    """Held-out batches as a list, so that every measurement has the same ones.

    Raises:
        ConfigError: for a single batch, or none.
    """
    require(
        not isinstance(given, Tensor | Mapping),
        f"heldout must be a list of batches; got one, a {type(given).__name__}. Give [batch].",
    )
    batches = list(given)
    require(
        bool(batches),
        "heldout must contain at least one batch; got none. Give one, or heldout=None.",
    )
    return batches


def evaluate(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    recorder: Recorder,
    choice: Choice,
) -> None:
    """Measures a model on batches in eval mode, and their loss if the model returns one."""
    with evaluating(model):
        for batch in batches:
            recorder.start(choice.of(batch))
            output = call_measured(recorder.probe, choice, forward, model, batch)
            recorder.stop()
            loss = loss_of(output)
            if loss is not None:
                recorder.add_validation(*loss)
