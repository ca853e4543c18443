"""What a module gets, and a few of its samples."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SAMPLES = 8
"""How many samples of features are compared, at least, to see that a nonlinearity left them."""


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module gets: the first positional argument, or the one tensor given by keyword."""
    if args:
        return args[0]
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another tensor in the place where `argument` found one."""
    if args:
        return (tensor, *args[1:]), kwargs
    return args, {k: tensor if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def sample_of(features: Tensor) -> Tensor:
    """Some of the samples, from all over them."""
    rows = features.reshape(-1, features.shape[-1])
    return rows[:: max(1, len(rows) // SAMPLES)]
