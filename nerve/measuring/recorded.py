"""Whether post depends on pre as the output of a nonlinearity does on its input, as recorded by
autograd: with no matrix in between, and not as on a mere factor."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

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


def check_part(pre: Tensor, post: Tensor, sites: tuple[Site, Site], where: str) -> None:
    """Raises `MeasurementError` if elements of post depend on features beside the part of a fused
    projection that is described as pre, and on none in it.

    Args:
        pre: the whole output of the projection, recorded by autograd.
        post: the whole tensor that holds post, with the graph to it.
        sites: the sites of pre and post.
        where: the FFN, for messages.
    """
    site = sites[0]
    with torch.enable_grad():
        rows = rows_along(post, sites[1].feature_axis)[:, sites[1].part]
    n, width = rows.shape
    if site.part == slice(None) or n < _ENOUGH or pre._version:  # overwritten: refused as such
        return
    kinds = set()
    others = _others(pre.shape[site.feature_axis], site.part, pre.device)
    for column in torch.linspace(0, width - 1, min(_COLUMNS, width)).long().tolist():
        with torch.enable_grad(), values_kept([pre]):
            (slope,) = torch.autograd.grad(rows[:, column].sum(), pre, retain_graph=True)
            hit = (rows_along(slope, site.feature_axis) != 0).any(0)
        inside, outside = bool(hit[site.part].any()), bool(hit[others].any())
        kinds.add((inside, outside))
    # With a gate there are some of both, and some without: of features that are clamped or dead.
    if (False, True) in kinds and (True, True) not in kinds:
        raise MeasurementError(
            f"Pre must be the part of a projection that the nonlinearity receives; {where} has "
            f"features after the nonlinearity that depend on columns beside {_told(site.part)}, "
            "and on none in it. Check the slices of pre and post in its description."
        )


_ENOUGH, _COLUMNS = 16, 16
"""Number of samples that show on which columns each feature depends, and of features examined."""


def _told(part: slice) -> str:
    step = "" if part.step is None else f":{part.step}"
    return f"[{'' if part.start is None else part.start}:{part.stop or ''}{step}]"


@contextmanager
def values_kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts back the values of tensors that a derivative taken in the block overwrites, as fused
    kernels do to save memory in a backward pass that they expect only once."""
    copies = [each.detach().clone() for each in tensors]
    try:
        yield
    finally:
        for each, copy in zip(tensors, copies, strict=True):
            each.data.copy_(copy)  # not counted as a modification


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


_VIEW = re.compile(r"view|reshape|transpose|permute|slice|split|chunk|select|unbind|squeeze|alias")
_NORM = re.compile(r"batchnorm|batch_norm")


def is_scaled(features: Tensor, node: torch.autograd.graph.Node, axis: int) -> bool:
    """Whether the only operation on a tensor, on the way to features, multiplies it by constants
    that differ along its feature axis, as batch normalization in eval mode does.

    Args:
        features: what depends on it.
        node: the operation that made the tensor.
        axis: its feature axis, negative.
    """
    assert features.grad_fn is not None
    users = _users(features.grad_fn)
    found = {*users[node]}
    while views := {node for node in found if _VIEW.search(node.name().lower())}:
        found = (found - views) | {user for view in views for user in users[view]}
    if len(found) != 1:
        return False
    (node,) = found
    name = node.name().lower()
    if _NORM.search(name):
        return True
    if not name.startswith(("mul", "div")) or len([*_next(node)]) != 1:
        return False
    saved: Any = node
    try:
        sides = (getattr(saved, "_saved_other", None), getattr(saved, "_saved_self", None))
    except RuntimeError:  # overwritten since
        return False
    constants = [each for each in sides if isinstance(each, Tensor) and each.grad_fn is None]
    return any(each.ndim >= -axis and each.shape[axis] > 1 for each in constants)


def _users(
    start: torch.autograd.graph.Node,
) -> dict[torch.autograd.graph.Node, set[torch.autograd.graph.Node]]:
    """For each node on the way from `start`, those that use its result."""
    users = defaultdict[torch.autograd.graph.Node, set[torch.autograd.graph.Node]](set)
    waiting, seen = [start], {start}
    while waiting:
        current = waiting.pop()
        for following in _next(current):
            users[following].add(current)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return users


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
    with torch.enable_grad(), values_kept([whole]):
        (slope,) = torch.autograd.grad(features.sum(), whole, create_graph=True)
        # If it is pre itself, overwritten, its graph is that of pre.
        is_itself = slope.data_ptr() == whole.data_ptr()
        slope = slope.detach().clone() if is_itself else slope.clone()
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
