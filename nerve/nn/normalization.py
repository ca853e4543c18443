"""The normalization factor: which norm a block uses, and where it is placed around its sublayers.

A wiring takes the stream x, the norm and the sublayer f, and returns the stream after the sublayer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from nerve.config import require, require_choice

Stream = Float[Tensor, "*batch d_model"]
Map = Callable[[Tensor], Tensor]
Wiring = Callable[[Tensor, Map, Map], Tensor]


def pre(x: Stream, norm: Map, sublayer: Map) -> Stream:
    """x + f(norm(x)): the stream itself is never normalized (Xiong et al. 2020)."""
    return x + sublayer(norm(x))


def post(x: Stream, norm: Map, sublayer: Map) -> Stream:
    """norm(x + f(x)): the stream is normalized after every sublayer (Vaswani et al. 2017)."""
    return norm(x + sublayer(x))


def residual_after_norm(x: Stream, norm: Map, sublayer: Map) -> Stream:
    """h + f(h) with h = norm(x): the norm acts before the stream branches (NerVE's release)."""
    normed = norm(x)
    return normed + sublayer(normed)


WIRINGS: dict[str, tuple[Wiring, Wiring]] = {
    "pre": (pre, pre),
    "post": (post, post),
    "pre_residual_after_norm": (residual_after_norm, pre),
}
"""Maps the placement of a layer to the wirings of its first and second sublayer."""


class Residual(nn.Module):
    """Applies a sublayer to the residual stream: its first argument is the stream before the
    sublayer and its norm, and its output is the stream after them.

    Args:
        wiring: one of the wirings in `WIRINGS`.
    """

    def __init__(self, wiring: Wiring) -> None:
        super().__init__()
        self._wiring = wiring

    def forward(self, x: Stream, norm: Map, sublayer: Map) -> Stream:
        return self._wiring(x, norm, sublayer)


NORMS: dict[str, type[nn.Module]] = {
    "layernorm": nn.LayerNorm,
    "rmsnorm": nn.RMSNorm,
    "none": nn.Identity,
}

PLACEMENTS = (*WIRINGS, "mix")


@dataclass(frozen=True)
class Normalization:
    """Which norm a network uses, and where its blocks apply it.

    Attributes:
        kind: `layernorm`, `rmsnorm`, or `none`, which replaces the norms of the blocks by the
            identity.
        placement: `pre` is x + f(norm(x)); `post` is norm(x + f(x)) (Vaswani et al. 2017); `mix` is
            `post` in the first `n_post_layers` layers and `pre` in the others (Li et al. 2024,
            Mix-LN); `pre_residual_after_norm` is `pre`, except that the residual of the first
            sublayer branches off after the norm, h + f(h) with h = norm(x), as in NerVE's released
            code.
        n_post_layers: only used by `mix`.
        final: whether there is a norm between the last block and the head; a LayerNorm if `kind` is
            `none`.
        eps: added to the variance (LayerNorm) or to the mean square (RMSNorm).

    Raises:
        ConfigError: for an unknown name, or values that contradict each other.
    """

    kind: str = "layernorm"
    placement: str = "pre"
    n_post_layers: int = 0
    final: bool = True
    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_choice("normalization.kind", self.kind, NORMS)
        require_choice("normalization.placement", self.placement, PLACEMENTS)
        require(
            self.kind != "none" or self.placement == "pre",
            "normalization.kind=none cannot be combined with "
            f"normalization.placement={self.placement}: there is no norm to place. "
            "Use normalization.placement=pre, or another kind.",
        )
        require(
            (self.placement == "mix") == (self.n_post_layers != 0),
            "normalization.n_post_layers is the number of PostLN layers, at least 1 with "
            "normalization.placement=mix and 0 otherwise; got "
            f"n_post_layers={self.n_post_layers} with placement={self.placement}.",
        )
        require(self.eps > 0, f"normalization.eps must be positive; got {self.eps}.")

    def placements(self, n_layers: int) -> list[str]:
        """The wiring of each layer, a key of `WIRINGS`, in order of depth.

        Raises:
            ConfigError: if `mix` would leave no PreLN layer.
        """
        if self.placement != "mix":
            return [self.placement] * n_layers
        require(
            0 < self.n_post_layers < n_layers,
            "normalization.n_post_layers must lie between 1 and model.n_layers - 1, so that both "
            f"placements occur; got {self.n_post_layers} of model.n_layers={n_layers}.",
        )
        return ["post"] * self.n_post_layers + ["pre"] * (n_layers - self.n_post_layers)

    def build(self, d_model: int) -> nn.Module:
        """A norm of a block, over the last dimension."""
        return NORMS[self.kind](d_model, eps=self.eps)

    def build_final(self, d_model: int) -> nn.Module:
        """The norm before the head."""
        if not self.final:
            return nn.Identity()
        return nn.LayerNorm(d_model, eps=self.eps) if self.kind == "none" else self.build(d_model)
