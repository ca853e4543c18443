"""Adapters: modules that add the product of two narrow matrices to a linear layer (LoRA and its
relatives) or scale its outputs (IA3), and need not declare its widths."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import nn


class _Matrix(NamedTuple):
    """The sizes of a matrix; a bare parameter does not say which of them is that of the input."""

    d_in: int
    d_out: int
    is_directed: bool

    @property
    def sizes(self) -> set[int]:
        return {self.d_in, self.d_out}


def adapted_widths(
    module: nn.Module, own: Callable[[nn.Module], tuple[int, int] | None]
) -> tuple[int, int] | None:
    """The input and output features of an adapter; None for any other module.

    An adapter holds one matrix, and one or more pairs of narrower ones that lead from its inputs to
    a few features and from these to its outputs; any of them is a linear layer or a parameter. Or
    it holds a linear layer, and a vector with an entry for each of its outputs.

    Args:
        module: the module, which does not declare its widths.
        own: gives the widths that a module declares itself.
    """
    if next(module.children(), None) is None:  # the usual case: an activation
        return None
    matrices = sorted(_matrices(module, own), key=lambda each: min(each.sizes))
    if len(matrices) == 1 and matrices[0].is_directed:
        d_in, d_out, _ = matrices[0]
        vectors = (p for p in module.parameters(recurse=False) if p.ndim == 1)
        return (d_in, d_out) if any(len(vector) == d_out for vector in vectors) else None
    if len(matrices) < 3:
        return None
    *narrow, main = matrices
    fewest = Counter(min(each.sizes) for each in narrow)
    if max(fewest) >= min(main.sizes) or any(n % 2 for n in fewest.values()):
        return None
    if not all(max(each.sizes) in main.sizes for each in narrow):
        return None
    if {max(each.sizes) for each in narrow} != main.sizes:
        return None
    if main.is_directed:
        return main.d_in, main.d_out
    for each in narrow:
        if each.is_directed:
            wide = max(each.sizes)
            (other,) = main.sizes - {wide} or {wide}
            return (wide, other) if each.d_in == wide else (other, wide)
    return None


def _matrices(
    module: nn.Module, own: Callable[[nn.Module], tuple[int, int] | None]
) -> Iterator[_Matrix]:
    """The matrices in a module, those of linear layers as a whole."""
    for parameter in module.parameters(recurse=False):
        if parameter.ndim > 1:
            n_rows, *others = parameter.shape
            yield _Matrix(math.prod(others), n_rows, is_directed=False)
    for child in module.children():
        widths = own(child)
        if widths is None:
            yield from _matrices(child, own)
        else:
            yield _Matrix(*widths, is_directed=True)
