"""Runs a model that is being measured."""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.tap import Taker, looking
from nerve.shared_context import SharedContext


@contextmanager
def evaluating(model: nn.Module, taker: Taker | None = None) -> Iterator[None]:
    """Puts the model in eval mode, without gradients, uncompiled, with plain tensors, outside of
    inference mode (which would keep autograd from recording dependence); restores it afterwards.

    Backward hooks of the user do not see the derivatives that a measurement takes.

    Two of these settings belong to the whole process: until the last thread has left this context,
    no thread runs compiled code or the fast path of nn.TransformerEncoder.

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
    hooks = [
        (module, name, vars(module)[name])
        for module in modes
        for name in ("_backward_hooks", "_backward_pre_hooks")
        if vars(module).get(name)
    ]
    model.eval()
    try:
        for module, name, _ in hooks:
            vars(module)[name] = OrderedDict()
        for parameter in trained:
            parameter.requires_grad_(False)
        eager = _eager() if "torch._dynamo" in sys.modules else nullcontext()
        with _dense(), torch.inference_mode(False), torch.no_grad(), eager, looking(taker):
            yield
    finally:
        # First what cannot fail: within torch.func, setting flags of parameters fails.
        for module, training in modes.items():
            module.training = training
        for module, name, own in hooks:
            vars(module)[name] = own
        for parameter in trained:
            parameter.requires_grad_()


@SharedContext
@contextmanager
def _dense() -> Iterator[None]:
    """Turns off the fast path of nn.TransformerEncoder, which bypasses its modules, with nested
    tensors for padding."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@SharedContext
def _eager() -> AbstractContextManager[None]:
    """Turns compiled code off, because code compiled earlier ignores the probe."""
    return torch.compiler.set_stance("force_eager")


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
