"""Where the features of a feed-forward network (FFN) are found in a model.

A site is the input or output of a module, or a part of it. An FFN has two: before and after its
nonlinearity.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import getattr_static
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.adapters import adapted_widths

SAMPLES = 8
"""How many samples of features are compared, at least, to see that a nonlinearity left them."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Widths(NamedTuple):
    """Input and output features that a projection declares, and the axis that holds them."""

    d_in: int
    d_out: int
    axis: int


def declared_widths(module: nn.Module) -> Widths | None:
    """The widths that a projection declares: a linear layer of any kind (`in_features`), a Conv1D
    of transformers (`nx`) or a convolution; for an adapter, those of the layer that it changes;
    None for any other module."""
    own = _own_widths(module)
    if own is not None:
        return own
    adapted = adapted_widths(module, _own_sizes)
    return None if adapted is None else Widths(*adapted, -1)


def _own_widths(module: nn.Module) -> Widths | None:
    if isinstance(module, _CONVOLUTIONS):
        return Widths(module.in_channels, module.out_channels, -1 - len(module.kernel_size))
    for names in (("in_features", "out_features"), ("nx", "nf")):
        d_in, d_out = (getattr(module, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return Widths(d_in, d_out, -1)
    return None


def _own_sizes(module: nn.Module) -> tuple[int, int] | None:
    own = _own_widths(module)
    return None if own is None else own[:2]


def forward_of(module: nn.Module) -> Any:
    """The forward of the module's class. That of a scripted module is an attribute that only its
    instances can read."""
    return getattr_static(type(module), "forward")


def is_adapter(module: nn.Module) -> bool:
    """Whether the module's widths are those of a linear layer inside it."""
    return _own_widths(module) is None and declared_widths(module) is not None


def is_pointwise(module: nn.Module) -> bool:
    """Whether a convolution multiplies each position by the same matrix (kernel size 1)."""
    return (
        isinstance(module, _CONVOLUTIONS)
        and math.prod(module.kernel_size) == module.groups == math.prod(module.stride) == 1
        and module.padding in ("valid", (0,) * len(module.kernel_size))
    )


def n_inputs(site: "Site") -> int | None:
    """Number of input features, which bounds the rank of pre; None if the module does not declare
    it."""
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
    """The input or output of a module, or a part of its features.

    The first half of a fused projection is `Site(mlp.gate_up_proj, "output", slice(0, d_ff))`.

    Attributes:
        module: the module.
        of: `output` or `input`. The input is the first positional argument, or the only tensor
            passed by keyword.
        part: slice of the features.
        axis: the feature axis; None for the module's default: axis 1 of a convolution's `[batch,
            channels, ...]`, the last axis of any other module.
    """

    module: nn.Module
    of: Literal["output", "input"]
    part: slice = field(default_factory=lambda: slice(None))
    axis: int | None = None

    @property
    def declared(self) -> int | None:
        """Declared width of the axis before slicing; None if the module does not declare it."""
        widths = declared_widths(self.module)
        if widths is None:
            return None
        return widths.d_out if self.of == "output" else widths.d_in

    @property
    def width(self) -> int | None:
        """Number of features; None if the module does not declare it."""
        return None if self.declared is None else len(range(self.declared)[self.part])

    @property
    def feature_axis(self) -> int:
        """The axis that holds the features."""
        widths = declared_widths(self.module)
        return self.axis if self.axis is not None else (-1 if widths is None else widths.axis)

    def features(self, tensor: Tensor) -> Tensor:
        """`[*samples, width]` from the module's input or output; the spatial axes of a convolution
        are flattened into one."""
        return last(tensor, self.feature_axis)[..., self.part]


def last(tensor: Tensor, axis: int) -> Tensor:
    """`tensor` with `axis` moved to the end; the axes after it are flattened into one."""
    behind = tensor.ndim - 1 - axis if axis >= 0 else -1 - axis
    if not behind:
        return tensor
    moved = tensor.movedim(axis, -1)
    return moved.flatten(-1 - behind, -2)


def rows_along(tensor: Tensor, axis: int) -> Tensor:
    """`[samples, features]` of a tensor whose features are along `axis`."""
    moved = last(tensor, axis)
    return moved.reshape(-1, moved.shape[-1])


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a module: the first positional argument, or the only tensor passed by
    keyword."""
    if args:
        return args[0]
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], tensor: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with another tensor in place of the one that `argument` finds."""
    if args:
        return (tensor, *args[1:]), kwargs
    return args, {k: tensor if isinstance(v, Tensor) else v for k, v in kwargs.items()}


def sample_of(features: Tensor, n: int = SAMPLES) -> Tensor:
    """`[m, width]`, a subset of the samples `[*samples, width]`: at least `n` if there are that
    many, spread evenly over all of them."""
    rows = features.reshape(-1, features.shape[-1])
    return rows[:: max(1, len(rows) // n)]


@runtime_checkable
class FFN(Protocol):
    """What the measurement needs of an FFN: its position and the sites around its nonlinearity.

    The FFNs of nerve's own networks have these attributes themselves; those of any other model are
    described by `FFNAdapter`, by `nerve.find_ffns` or by hand. The optional attributes `n_runs` (if
    it does not run exactly once per forward pass) and `stream` (its residual stream) have the same
    meaning as in `FFNAdapter`.
    """

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""

    @property
    def name(self) -> str:
        """Name of the FFN within the block: `ffn`, `token_mixing`, `channel_mixing`, …"""

    @property
    def pre(self) -> nn.Module | Site:
        """The module whose output is the pre-activation (up; gate if gated), or a site."""

    @property
    def post(self) -> nn.Module | Site:
        """The module whose input is the post-activation (down), or a site."""


@dataclass(frozen=True)
class FFNAdapter:
    """Describes one FFN of a model: where its features are before and after the nonlinearity.

    For GPT-2 of Hugging Face: `FFNAdapter(i, "ffn", block.mlp.c_fc, block.mlp.c_proj)`.

    Attributes:
        layer: index of the block, from 0.
        name: name of the FFN within the block.
        pre: the module whose output is the pre-activation (up; gate if gated), or a `Site`.
        post: the module whose input is the post-activation (down), or a `Site`.
        n_runs: number of runs per forward pass; None for any number, including zero (shared, looped
            or skipped layers). The samples of all runs are pooled.
        gated: whether the output of the nonlinearity is multiplied by a second projection; None if
            unknown. It does not affect the measurement.
        stream: the sites of the residual stream before the FFN (and its norm) and after it, or a
            module whose first argument and output these are. None if unknown.
        pool: name of an additional row that pools the samples of all FFNs of this layer with the
            same `pool`, such as `experts`.
        tokens: for an expert, which receives a subset of the tokens in any order: the site where
            all tokens appear.
    """

    layer: int
    name: str
    pre: nn.Module | Site
    post: nn.Module | Site
    n_runs: int | None = 1
    gated: bool | None = None
    stream: nn.Module | tuple[Site, Site] | None = None
    pool: str | None = None
    tokens: Site | None = None


def sites_of(ffn: FFN) -> tuple[Site, Site]:
    """The sites of pre and post.

    Raises:
        MeasurementError: if pre is the output of a module without weights, such as an activation.
    """
    pre = ffn.pre if isinstance(ffn.pre, Site) else Site(ffn.pre, "output")
    post = ffn.post if isinstance(ffn.post, Site) else Site(ffn.post, "input")
    if pre.of == "output" and not _has_weight(pre.module):
        raise MeasurementError(
            "Pre must be the output of a projection, before the nonlinearity; for "
            f"{named(ffn)} it is the output of {type(pre.module).__name__}, which has no weight "
            "matrix. Give the projection, or the input of the activation: "
            'nerve.Site(activation, "input").'
        )
    return pre, post


def n_runs_of(ffn: FFN) -> int | None:
    """The declared number of runs per forward pass; None for any number."""
    return getattr(ffn, "n_runs", 1)


def pool_of(ffn: FFN) -> str | None:
    """The name of the row that pools its samples with those of other FFNs; None if there is
    none."""
    return getattr(ffn, "pool", None)


def tokens_of(ffn: FFN) -> Site | None:
    """The site where all tokens appear, for an FFN that receives a subset of them in any order;
    None for an FFN that receives all."""
    return getattr(ffn, "tokens", None)


def require_distinct(ffns: Sequence[FFN]) -> None:
    """Raises `MeasurementError` if there are no FFNs, or several with the same layer and name."""
    if not ffns:
        raise MeasurementError("A measurement needs at least one FFN; got an empty list.")
    pools = {(ffn.layer, pool) for ffn in ffns if (pool := pool_of(ffn)) is not None}
    names = Counter([*((ffn.layer, ffn.name) for ffn in ffns), *pools])
    doubled = [key for key, n in names.items() if n > 1]
    if doubled:
        raise MeasurementError(
            f"Each FFN must have a unique (layer, name); {doubled[0]} is used more than once. Give "
            "one of them another layer or another name."
        )


def named(ffn: FFN) -> str:
    """The FFN's name in messages."""
    return f"{ffn.name} in layer {ffn.layer}"


def _has_weight(module: nn.Module) -> bool:
    held = [*module.parameters(), *module.buffers()]
    return declared_widths(module) is not None or any(tensor.ndim > 1 for tensor in held)
