"""What the measurement must know of a feed-forward network (FFN)."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from nerve.errors import MeasurementError
from nerve.measuring.sites import Site, declared_widths


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


def named(ffn: FFN) -> str:
    """As messages name it."""
    return f"{ffn.name} in layer {ffn.layer}"


def _has_weight(module: nn.Module) -> bool:
    held = [*module.parameters(), *module.buffers()]
    return declared_widths(module) is not None or any(tensor.ndim > 1 for tensor in held)
