"""Where the features of an FFN appear: what a module gives or gets, or a part of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

SAMPLES = 8
"""How many samples of features are compared, at least, to see that a nonlinearity left them."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Widths(NamedTuple):
    """What a projection declares: features that it gets and gives, and the axis that holds them."""

    d_in: int
    d_out: int
    axis: int


def declared_widths(module: nn.Module) -> Widths | None:
    """The widths that a module declares: a linear layer of any make (`in_features`), the Conv1D of
    transformers (`nx`), a convolution. None for one that declares none."""
    if isinstance(module, _CONVOLUTIONS):
        return Widths(module.in_channels, module.out_channels, -1 - len(module.kernel_size))
    for names in (("in_features", "out_features"), ("nx", "nf")):
        d_in, d_out = (getattr(module, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return Widths(d_in, d_out, -1)
    return None


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution is a matrix, the same one at each position."""
    return (
        isinstance(module, _CONVOLUTIONS)
        and math.prod(module.kernel_size) == module.groups == math.prod(module.stride) == 1
        and module.padding in ("valid", (0,) * len(module.kernel_size))
    )


def n_inputs(site: "Site") -> int | None:
    """How many numbers each feature is made of, which bounds the rank of pre; None where the module
    does not say."""
    widths = declared_widths(site.module)
    if widths is None:
        return None
    if site.of == "input":  # then there is no projection that is known
        return site.width
    if isinstance(site.module, _CONVOLUTIONS):
        return widths.d_in * math.prod(site.module.kernel_size)
    return widths.d_in


@dataclass(frozen=True, eq=False)
class Site:
    """What a module gives or gets, or a part of it.

    The first half of a fused projection is `Site(mlp.gate_up_proj, "output", slice(0, d_ff))`.

    Attributes:
        module: whose output or input it is.
        of: `output`, or `input`: the first positional argument, or the one tensor given by keyword.
        part: which of the features.
        axis: holds the features; None for what the module says: axis 1 of a convolution's
            `[batch, channels, ...]`, the last one of any other.
    """

    module: nn.Module
    of: Literal["output", "input"]
    part: slice = field(default_factory=lambda: slice(None))
    axis: int | None = None

    @property
    def declared(self) -> int | None:
        """How wide the module says that the axis is, before a part is taken; None: it does not."""
        widths = declared_widths(self.module)
        if widths is None:
            return None
        return widths.d_out if self.of == "output" else widths.d_in

    @property
    def width(self) -> int | None:
        """Number of features; None where the module does not declare it."""
        return None if self.declared is None else len(range(self.declared)[self.part])

    @property
    def feature_axis(self) -> int:
        """The axis that holds the features."""
        widths = declared_widths(self.module)
        return self.axis if self.axis is not None else (-1 if widths is None else widths.axis)

    def features(self, tensor: Tensor) -> Tensor:
        """`[*samples, width]` of what the module gives or gets; positions of an image, which a
        convolution has in several axes, become one."""
        return last(tensor, self.feature_axis)[..., self.part]


def last(tensor: Tensor, axis: int) -> Tensor:
    """`tensor` with that axis last; the axes that lay behind it become one."""
    behind = tensor.ndim - 1 - axis if axis >= 0 else -1 - axis
    if not behind:
        return tensor
    moved = tensor.movedim(axis, -1)
    return moved.flatten(-1 - behind, -2)


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


def sample_of(features: Tensor, n: int = SAMPLES) -> Tensor:
    """Some of the samples, at least `n` where there are so many, from all over them."""
    rows = features.reshape(-1, features.shape[-1])
    return rows[:: max(1, len(rows) // n)]
