"""What a module is called with, by name."""

import inspect
from typing import Any

from torch import nn

from nerve.measuring.streams import streams_of


def batch_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_name: bool = False
) -> Any:
    """The batch that a module is called with: its only argument, the tuple of its positional
    arguments, or the mapping of all arguments by name.

    Args:
        module: the module.
        args, kwargs: what it is called with.
        by_name: whether several positional arguments are a mapping, too, if their names show the
            tokens or their padding.
    """
    if not args:
        return kwargs
    if len(args) == 1 and not kwargs:
        return args[0]
    if not (kwargs or by_name):
        return args
    batch = by_names(module, args, kwargs)
    return batch if kwargs or streams_of(batch, is_encoder_decoder=False) else args


def by_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a module by name."""
    signature = signature_of(module)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError:  # a wrapper that passes on something else
        signature = inspect.signature(module.forward)
        bound = signature.bind_partial(*args, **kwargs)
    batch: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        is_rest = signature.parameters[name].kind == inspect.Parameter.VAR_KEYWORD
        batch |= value if is_rest else {name: value}
    return batch


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of a module's forward; if the module only passes on its arguments, as a
    compiled or distributed one does, that of the module in it."""
    signature, inside = inspect.signature(module.forward), list(module.children())
    kinds = {each.kind for each in signature.parameters.values()}
    passes_on = kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    return signature_of(inside[0]) if passes_on and len(inside) == 1 else signature
