"""What the measurement must know of a feed-forward network (FFN): where its features appear.

A site is what a module gives or gets, or a part of it; an FFN has two, before and after its
nonlinearity.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from nerve.errors import MeasurementError

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


@runtime_checkable
class FFN(Protocol):
    """What the measurement must know of an FFN: its place, and the sites around its nonlinearity.

    A module of a model fulfils it by having these attributes; for a model that has not, there are
    `nerve.find_ffns` and `FFNAdapter`. One that does not run once in each forward pass says so with
    `n_runs`, as there, and one that knows the residual stream around it with `stream`.
    """

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""

    @property
    def name(self) -> str:
        """Which FFN of the block: `ffn`, `token_mixing`, `channel_mixing`, …"""

    @property
    def pre(self) -> nn.Module | Site:
        """The module whose output is the pre-activation (up; gate where gated), or its site."""

    @property
    def post(self) -> nn.Module | Site:
        """The module whose input is the post-activation (down), or its site."""


@dataclass(frozen=True)
class FFNAdapter:
    """Describes one FFN of a model that does not fulfil the `FFN` protocol itself.

    For a GPT-2 of Hugging Face: `FFNAdapter(i, "ffn", block.mlp.c_fc, block.mlp.c_proj)`.

    Attributes:
        layer: index of the block, from 0.
        name: which FFN of the block.
        pre: the module whose output is the pre-activation (up; gate where gated), or a `Site`.
        post: the module whose input is the post-activation (down), or a `Site`.
        n_runs: how often it runs in one forward pass; None for any number, also none: layers that
            are shared, looped or skipped. The samples of all its runs are pooled.
        gated: whether what the nonlinearity gives is multiplied by a second projection; None where
            nobody said. It changes nothing that is measured.
        stream: where the residual stream is before the FFN (and its norm), and where after; or the
            module whose first argument and whose output these are. None where nobody said.
        pool: the name of one more row, of its samples together with those of the other FFNs of the
            layer that give this name: `experts`.
        tokens: of an expert, which gets some tokens in any order, where all of them appear.
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
        MeasurementError: where pre is given by a module that has no weight, as an activation is.
    """
    pre = ffn.pre if isinstance(ffn.pre, Site) else Site(ffn.pre, "output")
    post = ffn.post if isinstance(ffn.post, Site) else Site(ffn.post, "input")
    if pre.of == "output" and not _has_weight(pre.module):
        raise MeasurementError(
            "Pre must be the output of a projection, before the nonlinearity; of "
            f"{named(ffn)} it is that of {type(pre.module).__name__}, which has no matrix of "
            "weights. Name the projection, or take what the activation gets: "
            'nerve.Site(activation, "input").'
        )
    return pre, post


def n_runs_of(ffn: FFN) -> int | None:
    """How often it is said to run in one forward pass; None for any number."""
    return getattr(ffn, "n_runs", 1)


def pool_of(ffn: FFN) -> str | None:
    """The name under which its samples are pooled with those of others; None where they are not."""
    return getattr(ffn, "pool", None)


def tokens_of(ffn: FFN) -> Site | None:
    """Where all tokens appear of which it gets some, in any order; None where it gets all."""
    return getattr(ffn, "tokens", None)


def require_distinct(ffns: Sequence[FFN]) -> None:
    """Raises `MeasurementError` for no FFNs, and for several of one layer and name."""
    if not ffns:
        raise MeasurementError("A measurement needs at least one FFN; got an empty list.")
    pools = {(ffn.layer, pool) for ffn in ffns if (pool := pool_of(ffn)) is not None}
    names = Counter([*((ffn.layer, ffn.name) for ffn in ffns), *pools])
    doubled = [key for key, n in names.items() if n > 1]
    if doubled:
        raise MeasurementError(
            f"Layer and name must tell FFNs apart; (layer, name) = {doubled[0]} stands for several."
        )


def named(ffn: FFN) -> str:
    """As messages name it."""
    return f"{ffn.name} in layer {ffn.layer}"


def _has_weight(module: nn.Module) -> bool:
    held = [*module.parameters(), *module.buffers()]
    return declared_widths(module) is not None or any(tensor.ndim > 1 for tensor in held)
