"""Runs a model that is being measured."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.tap import Taker, looking


@contextmanager
def evaluating(model: nn.Module, taker: Taker | None = None) -> Iterator[None]:
    """Puts the model in eval mode, without gradients, uncompiled, with plain tensors, outside of
    inference mode (which would keep autograd from recording dependence); restores it afterwards.

    Args:
        model: the model.
        taker: the taker that may continue, besides those that start; others pause.
    """
    modes = {module: module.training for module in model.modules()}
    # Autograd may record operations on features, but not on weights, which a forward may overwrite.
    # Weights created in inference mode take part in no graph, whatever their flag says.
    trained = [
        each for each in model.parameters() if each.requires_grad and not each.is_inference()
    ]
    # nn.TransformerEncoder's fast path bypasses its modules, with nested tensors for padding.
    fast = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad(), _uncompiled(), looking(taker):
            yield
    finally:
        # First what cannot fail: within torch.func, setting flags of parameters fails.
        for module, training in modes.items():
            module.training = training
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter in trained:
            parameter.requires_grad_()


def _uncompiled() -> AbstractContextManager[object]:
    """Turns compiled code off, because code compiled earlier ignores the probe; does nothing if the
    compiler is not loaded."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def call(model: nn.Module, batch: Any) -> object:
    """Calls a model with a batch; the entries of a mapping are its keyword arguments.

    Raises:
        MeasurementError: if the model does not accept a mapping or a tuple this way.
    """
    if not isinstance(batch, Mapping | tuple | list):
        return model(batch)
    try:
        return model(**batch) if isinstance(batch, Mapping) else model(batch)
    except (TypeError, AttributeError) as error:
        how = "model(**batch)" if isinstance(batch, Mapping) else "model(batch)"
        name = "['x']" if isinstance(batch, Mapping) else "[0]"
        raise MeasurementError(
            f"The model is called with a batch as {how}, here a {type(batch).__name__}; "
            f"{type(model).__name__} raised: {error}. If the loader yields more than the inputs, "
            f"select them: forward=lambda model, batch: model(batch{name})."
        ) from error
