"""How features follow from one another, as autograd recorded it."""

import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from nerve.measuring.sites import last, sample_of

_ROWS = 512
"""How many samples tell a factor from a nonlinearity, at least."""

Way = Literal["directly", "through a matrix", "not at all"]

# Nodes of autograd that mix features by weights or by attention: AddmmBackward0, BmmBackward0,
# ConvolutionBackward0, ScaledDotProductFlashAttentionForCpuBackward0, LinearBackward0, …
_MATRIX = re.compile(r"mm(back|$)|(?<!non)linear|convolution|matmul|attention|dotproduct|einsum")


def way_from(node: torch.autograd.graph.Node, features: Tensor) -> Way:
    """How `features` follow from what `node` gave: without a matrix in between, or through one.

    A linear upsampling would pass for a matrix; no FFN has one between its sides.
    """
    if features.grad_fn is None:
        return "not at all"
    if _reaches(features.grad_fn, node, through_matrices=False):
        return "directly"
    through = _reaches(features.grad_fn, node, through_matrices=True)
    return "through a matrix" if through else "not at all"


def _reaches(
    start: torch.autograd.graph.Node, node: torch.autograd.graph.Node, *, through_matrices: bool
) -> bool:
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [start]
    while waiting:
        current = waiting.pop()
        if current is node:
            return True
        if current in seen or (not through_matrices and _MATRIX.search(current.name().lower())):
            continue
        seen.add(current)
        waiting += _next(current)
    return False


def _next(node: torch.autograd.graph.Node) -> Iterable[torch.autograd.graph.Node]:
    return [following for following, _ in node.next_functions if following is not None]


def is_factor(side: Tensor, features: Tensor, axis: int) -> bool:
    """Whether `features` are the product of `side` with something else, as the ungated side of a
    gated FFN: linear in it, element by element, by a slope that does not depend on it.

    Args:
        side: recorded by autograd, of 32 bits or more: rounding to 16 would look like it.
        features: what follows from it, in the same shape or flattened.
        axis: holds the features of `side`.
    """
    assert side.grad_fn is not None
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(features.sum(), side, create_graph=True)
    if slope.grad_fn is not None and _reaches(slope.grad_fn, side.grad_fn, through_matrices=True):
        return False
    x, h, slope = side.detach(), features.detach().reshape(side.shape), slope.detach()
    x, h, slope = (sample_of(last(each, axis), _ROWS) for each in (x, h, slope))
    if not bool(h.isfinite().all()):
        return False
    is_linear = torch.allclose(x * slope, h, rtol=1e-4, atol=1e-5 * float(h.abs().max()))
    # As of a ReLU that is written as a clamp, whose derivative no graph has.
    is_cut = not bool(slope[x < 0].any())
    return is_linear and not is_cut and not decides(x, x, h)


def decides(side: Tensor, product: Tensor, h: Tensor) -> bool:
    """Whether `h / product` is one number for each sign of `side`, feature by feature."""
    usable = product.abs() > product.abs().mean() * 1e-2
    ratio = torch.where(usable, h / product, torch.nan)
    for sign in (side > 0, side < 0):
        some = ratio.masked_fill(~sign, torch.nan)
        high = some.nan_to_num(-torch.inf).amax(0)
        low = some.nan_to_num(torch.inf).amin(0)
        apart = (high - low).masked_fill(high < low, 0)
        if bool((apart > 1e-2 * ratio.nan_to_num().abs().max()).any()):
            return False
    return True
