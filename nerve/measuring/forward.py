"""Runs a model that is being measured."""

import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.tap import Taker, looking
from nerve.measuring.unchanged import random_states_kept, states_kept
from nerve.shared_context import SharedContext


@contextmanager
def evaluating(model: nn.Module, taker: Taker | None = None) -> Iterator[None]:
    """Puts the model in eval mode, without gradients, uncompiled, with plain tensors, outside of
    inference mode (which would keep autograd from recording dependence); restores it afterwards,
    with what forward passes have changed in it, and the random states.

    Backward hooks of the user do not see the derivatives that a measurement takes, nor do hooks for
    saved tensors, such as those of activation checkpointing around the pass that is measured.

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
        with (
            random_states_kept(),
            states_kept(model),
            _dense(),
            torch.inference_mode(False),
            torch.no_grad(),
            eager,
            _saving_apart(),
            looking(taker),
        ):
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


def _saving_apart() -> AbstractContextManager[None]:
    """Keeps hooks for saved tensors from seeing those of the block; transforms of torch.func, which
    allow no such hooks, have none."""
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


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


def call_as_taken(model: nn.Module, batch: Any) -> object:
    """Calls a model with what a loop has given it, or a step has received, to see how it runs: with
    all entries of a tuple, with the tuple, or with the first entry, whichever it takes first.

    Raises:
        MeasurementError: as `call` does.
    """
    if isinstance(batch, tuple | list):
        for given in (tuple(batch), (batch,), tuple(batch[:1])):
            with suppress(Exception):  # of any kind, for what it does not take
                return model(*given)
    return call(model, batch)
