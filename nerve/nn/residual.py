"""How a block of two sublayers is wired around its norms.

A wiring takes the stream x, the norm and the sublayer f, and gives the stream after the sublayer.
"""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

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
"""The placement of a layer to the wirings of its first and second sublayer."""
