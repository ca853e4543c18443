"""Squared distances from a mean by the position of samples in their sequences."""

import math

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

LEAST_SEQUENCES = 8
"""A position counts where at least so many sequences reach it: fewer are single samples."""

_ROWS = 8192
_ROWS_OF_16_BITS = 32_768


class Positions:
    """The sum of the samples of each position, and of their squares, over any number of updates.

    The squares about any mean follow from these: float64 loses `1e-16 |mean|^2 / variance` of them.

    Args:
        dim: number of features.
        device: where the state lives.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self._dim = dim
        self._are_there = True
        self._sums = torch.zeros(0, dim, dtype=torch.float64, device=device)
        self._counts_and_squares = self._sums.new_zeros(2, 0)  # the squares about 0

    @property
    def n(self) -> int:
        """The length of the longest sequence so far; 0 where features have no positions."""
        return len(self._sums) if self._are_there else 0

    def sums_of(
        self, x: Float[Tensor, "*samples dim"], mask: Bool[Tensor, "*samples"] | None
    ) -> Float64[Tensor, "positions dim"]:
        """The sums over the sequences; features without positions are all of one.

        They are of float64, but of float32 over rows of 16 bits, which it holds with as few bits
        lost, and a GPU adds it sooner.
        """
        x = x.reshape(-1, _length(x.shape[:-1]), self._dim)
        mask = None if mask is None else mask.reshape(*x.shape[:2], 1)
        is_wide = x.dtype.itemsize > 2
        dtype = torch.float64 if is_wide else torch.float32
        sums = x.new_zeros(x.shape[1:], dtype=torch.float64)
        size = max(1, (_ROWS if is_wide else _ROWS_OF_16_BITS) // max(1, x.shape[1]))
        for first in range(0, len(x), size):
            sequences = x[first : first + size]
            if mask is not None:
                sequences = torch.where(mask[first : first + size], sequences, 0)
            sums += sequences.sum(0, dtype=dtype)
        return sums

    def add(
        self,
        sums: Float64[Tensor, "positions dim"],
        squares: Float64[Tensor, " n"],
        mean: Float64[Tensor, " dim"],
        shape: torch.Size,
        mask: Bool[Tensor, "*samples"] | None,
    ) -> None:
        """Adds samples.

        Args:
            sums: as `sums_of` gives them.
            squares: the squared distances of those that count from `mean`.
            mean: any vector.
            shape: of all samples.
            mask: True for those that count.
        """
        self._are_there &= len(shape) > 1
        if mask is None:
            counted = squares.new_ones(shape).reshape(-1, len(sums)).sum(0)
        else:
            squares = squares.new_zeros(mask.shape).masked_scatter(mask, squares)
            counted = mask.reshape(-1, len(sums)).sum(0).double()
        squares = squares.reshape(-1, len(sums)).sum(0)
        squares += 2 * (sums @ mean) - counted * mean.square().sum()  # about 0
        longer = len(sums) - len(self._sums)
        if longer > 0:
            self._sums = torch.nn.functional.pad(self._sums, (0, 0, 0, longer))
            pad = torch.nn.functional.pad(self._counts_and_squares, (0, longer))
            self._counts_and_squares = pad
        self._sums[: len(sums)] += sums
        self._counts_and_squares[:, : len(sums)] += torch.stack([counted, squares])

    def about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, "2 positions"]:
        """Of each position the number of samples and their total squared distance from `mean`;
        no positions where features have none."""
        counts, squares = self._counts_and_squares
        squares = squares - 2 * (self._sums @ mean) + counts * mean.square().sum()
        return torch.stack([counts, squares])[:, : self.n]


def largest_mean(positions: Float64[Tensor, "2 positions"]) -> Float64[Tensor, ""]:
    """The largest mean square of those positions that enough sequences reach; NaN without any."""
    counts, squares = positions
    means = torch.where(counts >= LEAST_SEQUENCES, squares / counts, -math.inf)
    largest = torch.cat([means, means.new_full((1,), -math.inf)]).max()
    return torch.where(largest.isfinite() & (positions.shape[1] > 1), largest, math.nan)


def _length(shape: torch.Size) -> int:
    return shape[-1] if len(shape) > 1 else 1
