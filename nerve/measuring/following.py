"""Whether post depends on pre with no matrix in between, as recorded by autograd."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import Site, last, sample_of
from nerve.measuring.tap import plain

ENOUGH = 64
"""With this many samples an FFN is known; with fewer, dependence may be misjudged."""

_ROWS = 512
"""Minimum number of samples that distinguish a factor from a nonlinearity."""

Way = Literal["directly", "through a matrix", "not at all"]

# Nodes of autograd that mix features by weights or by attention: AddmmBackward0, BmmBackward0,
# ConvolutionBackward0, ScaledDotProductFlashAttentionForCpuBackward0, LinearBackward0, …
_MATRIX = re.compile(r"mm(back|$)|(?<!non)linear|convolution|matmul|attention|dotproduct|einsum")


class Following:
    """Lets autograd record what happens between pre and post of each FFN until it is known: in its
    first run, and, if that had few samples, in later ones.

    Gradients are otherwise off: they are turned on when pre appears and off when post is there. In
    training, the model's own graph is inspected. Inference mode does not allow recording and is
    left for the forward passes that need it; compiled code cannot be inspected.

    Args:
        described: indices of the FFNs for which inference mode is left: those that are described
            by the caller and not modules of the model itself.
    """

    def __init__(self, described: Iterable[int]) -> None:
        self._described = set(described)
        self._known: set[int] = set()
        self._recording: set[int] = set()
        self._outside: Any = None

    def start_forward(self) -> None:
        """Leaves inference mode if there is an FFN that is not known."""
        if torch.is_inference_mode_enabled() and not self._described <= self._known:
            self._outside = torch.inference_mode(False)
            self._outside.__enter__()
            torch.set_grad_enabled(False)
            _OPEN.append(self._outside)

    @property
    def is_recording(self) -> bool:
        """Whether autograd records what happens between pre and post of an FFN."""
        return bool(self._recording)

    def begin(self, index: int, tensor: Any, where: str) -> tuple[Any, bool]:
        """The tensor with which the model continues in place of pre, and whether it is a new one:
        one that autograd records from now on, if the FFN is unknown and recording does not
        interfere.

        Args:
            index: the index of the FFN.
            tensor: the tensor that holds pre.
            where: the FFN, for messages.
        """
        if (
            torch.compiler.is_compiling()
            or index in self._known
            or torch.is_grad_enabled()
            or torch.is_inference_mode_enabled()
            or index in self._recording
        ):
            return tensor, False
        given = plain(tensor, "pre", where)
        self._recording.add(index)
        torch.set_grad_enabled(True)
        return given.requires_grad_().clone(), True

    def recorded(self, index: int, tensor: Tensor) -> Tensor | None:
        """`tensor`, which holds pre, if what depends on it is to be checked."""
        if torch.compiler.is_compiling() or index in self._known or tensor.grad_fn is None:
            return None
        return tensor

    def end(self, index: int, pre: Tensor | None, post: Any, site: Site, where: str) -> bool:
        """Checks that post depends on pre; returns whether autograd was recording only for that.

        Args:
            index: of the FFN.
            pre: the result of `recorded`.
            post: the tensor that holds post.
            site: the site of pre.
            where: the FFN, for messages.

        Raises:
            MeasurementError: if it does not, or if pre is the factor that multiplies.
        """
        is_ours = not torch.compiler.is_compiling() and index in self._recording
        if is_ours:
            self._recording.discard(index)
            torch.set_grad_enabled(bool(self._recording))
        if pre is not None:
            check_follows(pre, post, where)
            if is_ours:
                check_is_no_factor(pre, post, site, where)
            if pre.numel() >= ENOUGH * pre.shape[site.feature_axis]:
                self._known.add(index)
        return is_ours

    def finish_forward(self) -> None:
        """Ends a forward pass that completed."""
        if self._recording:
            torch.set_grad_enabled(False)
        if self._outside is not None:
            self._outside.__exit__(None, None, None)
            _OPEN.remove(self._outside)
        self.forget()

    def forget(self) -> None:
        """Ends a forward pass, however it went.

        The gradient mode is left alone: after an error, whatever turned gradients off has turned
        them on again, and otherwise the forward pass was finished.
        """
        self._recording.clear()
        self._outside = None


_OPEN: list[Any] = []
"""Inference modes that were left and not yet reentered. One that an error has ended is kept:
releasing it would reenter it."""


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


def check_is_no_factor(pre: Tensor, post: Tensor, site: Site, where: str) -> None:
    """Raises `MeasurementError` if pre is the factor of a gated FFN that multiplies.

    Args:
        pre: the input or output of the module of `site`, recorded by autograd.
        post: what depends on it.
        site: the site of pre.
        where: the FFN, for messages.
    """
    # In a fused projection another part is a factor; rounding to 16 bits would look like one.
    is_whole = site.part == slice(None) and pre.numel() == post.numel() > 0
    if is_whole and pre.dtype.itemsize > 2 and is_factor(pre, post, site.feature_axis):
        raise MeasurementError(
            f"Pre must be the input of the nonlinearity; in {where} it is the factor that "
            "multiplies the output of the nonlinearity. Give the gate projection."
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


def is_factor(side: Tensor, features: Tensor, axis: int) -> bool:
    """Whether `features` are the product of `side` with something else, like the ungated factor of
    a gated FFN: linear in it, elementwise, with a slope that does not depend on it.

    Args:
        side: recorded by autograd, in 32 bits or more: rounding to 16 would look like a factor.
        features: what depends on it, in the same shape or flattened.
        axis: the axis that holds the features of `side`.
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
    # For example a ReLU written as a clamp, whose derivative is in no graph.
    is_cut = not bool(slope[x < 0].any())
    return is_linear and not is_cut and not decides(x, x, h)


def decides(side: Tensor, product: Tensor, h: Tensor) -> bool:
    """Whether `h / product` is a single number for each sign of `side`, feature by feature."""
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
