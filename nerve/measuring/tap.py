"""An operator that hands features on, which compiled code holds as it is."""

from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Taker(Protocol):
    """What gets features.

    Attributes:
        is_taking: whether it does now.
    """

    @property
    def is_taking(self) -> bool: ...

    def take(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor) -> None:
        """Takes those of an FFN."""


_numbers = count()
_takers: WeakValueDictionary[int, Taker] = WeakValueDictionary()


def registered(taker: Taker) -> int:
    """The number by which `tap` knows who gets its features: compiled code can name none else."""
    number = next(_numbers)
    _takers[number] = taker
    return number


def is_taking() -> bool:
    """Whether anything taps features now: then what runs must run Python, too."""
    return any(taker.is_taking for taker in _takers.values())


@torch.library.custom_op("nerve::tap", mutates_args={"order"})
def tap(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, taker: int, index: int
) -> None:
    """Gives features to a taker. It is said to change `order`, so that the compiler neither drops
    nor reorders it."""
    _takers[taker].take(index, inputs, pre, post, sample)


@tap.register_fake
def _(
    inputs: Tensor, pre: Tensor, post: Tensor, sample: Tensor, order: Tensor, taker: int, index: int
) -> None:
    """Tracing taps nothing."""
