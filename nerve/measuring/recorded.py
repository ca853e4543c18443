"""Whether post depends on pre as the output of a nonlinearity does on its input, as recorded by
autograd: with no matrix in between, and not as on a mere factor."""

import math
import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import Site, rows_along, sample_of

_ROWS = 512
"""Minimum number of samples that distinguish a factor from a nonlinearity."""

_AFFINE = 1e-3
"""The largest deviation of an affine function, relative to its variation: TF32 rounds factors to 11
digits."""

Way = Literal["directly", "through a matrix", "not at all"]

# Nodes of autograd that mix features by weights or by attention: AddmmBackward0, BmmBackward0,
# ConvolutionBackward0, ScaledDotProductFlashAttentionForCpuBackward0, LinearBackward0, …
_MATRIX = re.compile(r"mm(back|$)|(?<!non)linear|convolution|matmul|attention|dotproduct|einsum")


def check_follows(pre: Tensor, post: Tensor, where: str) -> None:
    """Raises `MeasurementError` unless autograd has recorded that post depends on pre without a
    matrix in between."""
    assert pre.grad_fn is not None
    way = way_from(pre.grad_fn, post)
    if way != "directly":
        raise MeasurementError(
            f"Post must depend on pre only through the nonlinearity; for {where} it depends on pre "
            f"{way}. Check the modules in its description: the projection before the nonlinearity "
            "of one FFN, and the one after it."
        )


def check_is_no_factor(pre: Tensor, post: Tensor, inputs: Tensor, site: Site, where: str) -> None:
    """Raises `MeasurementError` if pre is the factor of a gated FFN that multiplies.

    Both factors of a bilinear FFN multiply, and the description says which one is pre.

    Args:
        pre: the input or output of the module of `site`, recorded by autograd.
        post: what depends on it.
        inputs: what the FFN gets, `[*samples, d_in]`.
        site: the site of pre.
        where: the FFN, for messages.
    """
    # Rounding to 16 bits would look like a factor.
    if pre.dtype.itemsize == 2 or not post.numel():
        return
    slope = slope_of_factor(pre, post, site)
    if slope is not None and not is_affine(inputs.flatten(0, -2), slope):
        raise MeasurementError(
            f"Pre must be the input of the nonlinearity; in {where} it is the factor that "
            "multiplies the output of the nonlinearity. Give the gate projection. (If there is no "
            "nonlinearity, as in a bilinear FFN, only more samples than inputs show that.)"
        )


def way_from(node: torch.autograd.graph.Node, features: Tensor) -> Way:
    """How `features` depend on the output of `node`: without a matrix in between, or through one.

    A linear upsampling would count as a matrix; no FFN has one between pre and post.
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


def slope_of_factor(whole: Tensor, features: Tensor, site: Site) -> Tensor | None:
    """The slope of `features` along pre, `[samples, width]`, if they are the product of pre with
    something else, like the ungated factor of a gated FFN: linear in it, elementwise, with a slope
    that does not depend on it. Otherwise None.

    Args:
        whole: the tensor that holds pre, recorded by autograd, in 32 bits or more: rounding to 16
            would look like a factor.
        features: what depends on it, with the axes of `whole` or flattened.
        site: the site of pre.
    """
    axis, part = site.feature_axis, site.part
    size = [*whole.shape]
    size[axis] = len(range(whole.shape[axis])[part])
    if features.numel() != math.prod(size):
        return None
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(features.sum(), whole, create_graph=True)
    if _varies_along(slope, whole, site):
        return None
    rows = [rows_along(each.detach(), axis) for each in (whole, slope, features.reshape(size))]
    every, slopes, h = (sample_of(each, _ROWS) for each in rows)
    if not bool(h.isfinite().all()):
        return None
    x, along = every[:, part], slopes[:, part]
    is_linear = torch.allclose(x * along, h, rtol=1e-4, atol=1e-5 * float(h.abs().max()))
    # For example a ReLU written as a clamp, whose derivative is in no graph.
    is_cut = not bool(along[x < 0].any())
    product = x
    others = _others(every.shape[1], part, every.device)
    if bool(slopes[:, others].any()):  # of a fused projection: the other factor is among them
        if len(others) != x.shape[1]:
            return None
        product = x * every[:, others]
    is_factor = is_linear and not is_cut and not decides(x, product, h)
    return rows[1][:, part] if is_factor else None


def _others(n: int, part: slice, device: torch.device) -> Tensor:
    """The columns, of n, that are not in a part."""
    is_other = torch.ones(n, dtype=torch.bool)
    is_other[part] = False
    return is_other.nonzero()[:, 0].to(device)


def _varies_along(slope: Tensor, whole: Tensor, site: Site) -> bool:
    """Whether the slope along pre depends on pre; within a fused projection, where it may depend on
    other columns, if its derivative is not 0."""
    if slope.grad_fn is None:
        return False
    if site.part == slice(None):
        assert whole.grad_fn is not None
        return _reaches(slope.grad_fn, whole.grad_fn, through_matrices=True)
    with torch.enable_grad():
        (second,) = torch.autograd.grad(site.features(slope).sum(), whole, allow_unused=True)
    return second is not None and bool(site.features(second).any())


def is_affine(x: Tensor, y: Tensor) -> bool:
    """Whether some features are an affine function of others of the same samples; False if there
    are not enough samples to tell.

    Args:
        x: `[samples, d_in]`.
        y: `[samples, width]`, of which some columns are examined.
    """
    n_needed = x.shape[1] + _ROWS // 8
    if len(x) < n_needed:
        return False
    x, y = (sample_of(each, 2 * n_needed).detach().double().cpu() for each in (x, y))
    x, y = torch.cat([x, x.new_ones(len(x), 1)], 1), y[:, :: max(1, y.shape[1] // 8)]
    # For inputs that are linearly dependent, too, as after a LayerNorm.
    fit = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return float((fit - y).norm()) <= _AFFINE * float((y - y.mean(0)).norm())


def decides(side: Tensor, product: Tensor, h: Tensor) -> bool:
    """Whether `h / product` is a single number for each sign of `side`, feature by feature; all are
    `[samples, width]`."""
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
