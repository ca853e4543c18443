"""Parameters that an optimizer updates at once, with one kernel for an operation on all of them."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from torch import Tensor

MOST_ELEMENTS = 2**27
"""The largest number of elements that are stacked, half a gigabyte in float32: stacking more of
such large matrices would not be faster."""


def alike(
    parameters: Iterable[Tensor], more: Callable[[Tensor], Hashable] = lambda parameter: None
) -> Iterator[list[Tensor]]:
    """Lists of the parameters that have gradients, each of one shape, dtype and device.

    Args:
        parameters: those of a group.
        more: what else parameters of one list have in common.
    """
    lists: dict[tuple[Any, ...], list[Tensor]] = {}
    for each in parameters:
        if each.grad is not None:
            key = (each.shape, each.dtype, each.device, more(each))
            lists.setdefault(key, []).append(each)
    for some in lists.values():
        n = max(1, MOST_ELEMENTS // max(1, some[0].numel()))
        yield from (some[start : start + n] for start in range(0, len(some), n))
