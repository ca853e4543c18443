"""How features follow from one another, as autograd recorded it."""

import re
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

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
