"""Sums of the samples at each sequence position, and of their squared distances from a mean.

Padding may come first, so positions count from the first sample of a sequence that is not padding.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

LEAST_SEQUENCES = 8
"""A position counts if at least this many sequences reach it; fewer say little about a position."""

_ROWS, _ROWS_OF_16_BITS = 8192, 32_768
"""Samples that are summed at a time, those of 16 bits in float32."""


class Positions:
    """The sums of the samples at each position, and of their squared distances, over any number of
    updates.

    Squared distances from one mean follow from those from another. They are kept for the latest
    mean, because converting them to a nearby mean loses no digits.
    """

    def __init__(self) -> None:
        self._are_there = True
        self._held: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def n(self) -> int:
        """The length of the longest sequence so far; 0 where features have no positions."""
        return len(self._held[0]) if self._held is not None and self._are_there else 0

    def add(
        self,
        sums: Float64[Tensor, "positions dim"],
        counts_and_squares: Float64[Tensor, "2 positions"],
        mean: Float64[Tensor, " dim"],
        *,
        are_there: bool,
    ) -> None:
        """Adds samples.

        Args:
            sums: of the samples at each position.
            counts_and_squares: their number and the sum of their squared distances from `mean`.
            mean: any vector; it is kept and must not be changed.
            are_there: whether the features have positions; if not, all samples are at a single one.
        """
        self._are_there &= are_there
        if self._held is not None:
            held, own = self._held[0], self._about(mean)
            longest = max(len(held), len(sums))
            sums = _longer(held.T, longest).T + _longer(sums.T, longest).T
            counts_and_squares = _longer(own, longest) + _longer(counts_and_squares, longest)
        self._held = sums, counts_and_squares, mean

    def about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, "2 positions"]:
        """For each position, the number of samples and the sum of their squared distances from
        `mean`; empty if the features have no positions."""
        if self._held is None:
            return mean.new_zeros(2, 0)
        return self._about(mean)[:, : self.n]

    def _about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, "2 positions"]:
        assert self._held is not None
        sums, counts_and_squares, center = self._held
        if center is mean:
            return counts_and_squares
        # sum |x - m|^2 = sum |x - c|^2 + 2 (c - m) sum x - n (c - m) (c + m)
        move = center - mean
        counts, squares = counts_and_squares
        squares = torch.addmv(squares, sums, move, alpha=2)
        squares = torch.addcmul(squares, counts, move.dot(center + mean), value=-1)
        return torch.stack([counts, squares])


def _longer(x: Float64[Tensor, "rows n"], longest: int) -> Float64[Tensor, "rows longest"]:
    """Padded with zeros to the longest sequence."""
    return x if x.shape[1] == longest else pad(x, (0, longest - x.shape[1]))


class Padding(NamedTuple):
    """Which samples of padded sequences count, and at which positions they are.

    Attributes:
        mask: True for the samples that count, by column.
        counts: the same by position.
        rows: the index of the sample at each position among all samples; None if positions are
            columns. After the end of a sequence, it is the index of some sample, which does not
            count.
    """

    mask: Bool[Tensor, "sequences positions"]
    counts: Bool[Tensor, "sequences positions"]
    rows: Int64[Tensor, "sequences positions"] | None

    @classmethod
    def of(
        cls,
        mask: Bool[Tensor, "sequences positions"],
        unpadded: Bool[Tensor, "sequences positions"] | None = None,
    ) -> "Padding":
        """The padding of sequences whose samples count where `mask` is True; waits for the device.

        Args:
            mask: True for the samples that count.
            unpadded: True for those that are no padding; None if all that do not count are.
        """
        known = mask if unpadded is None else unpadded
        start, (n_sequences, n) = known.int().argmax(1, keepdim=True), mask.shape
        if not start.any():
            return cls(mask, mask, None)
        columns = start + torch.arange(n, device=mask.device)
        inside, columns = columns < n, columns.clamp(max=n - 1)
        rows = columns + n * torch.arange(n_sequences, device=mask.device)[:, None]
        return cls(mask, mask.gather(1, columns) & inside, rows)


def sums_of_positions(
    x: Float[Tensor, "sequences positions dim"], padding: Padding | None
) -> Float64[Tensor, "positions dim"]:
    """The sums over the sequences, in float64. 16-bit features are summed in float32 within chunks,
    which is as accurate for them and faster on a GPU."""
    is_wide = x.dtype.itemsize > 2
    dtype = torch.float64 if is_wide else torch.float32
    size = max(1, (_ROWS if is_wide else _ROWS_OF_16_BITS) // max(1, x.shape[1]))
    sums: Tensor | None = None
    samples = x.flatten(0, 1) if padding is not None else x
    for first in range(0, len(x), size):
        some = slice(first, first + size)
        sequences = x[some]
        if padding is not None:
            if padding.rows is not None:
                moved = samples.index_select(0, padding.rows[some].flatten())
                sequences = moved.view_as(sequences)
            sequences = torch.where(padding.counts[some, :, None], sequences, 0)
        found = sequences.sum(0, dtype=dtype)
        sums = found.double() if sums is None else sums.add_(found)
    assert sums is not None
    return sums


def counts_and_squares(
    squares: Float64[Tensor, " n"], n_positions: int, padding: Padding | None
) -> Float64[Tensor, "2 positions"]:
    """For each position, the number of samples that count and the sum of their `squares`, which
    are given only for the samples that count."""
    if padding is None:
        of_positions = squares.new_full((2, n_positions), len(squares) // n_positions)
        squares = squares.reshape(-1, n_positions)
    else:
        of_positions = squares.new_empty(2, n_positions)
        of_positions[0] = padding.counts.sum(0)
        squares = squares.new_zeros(padding.mask.shape).masked_scatter(padding.mask, squares)
        if padding.rows is not None:
            squares = squares.take(padding.rows).where(padding.counts, 0)
    torch.sum(squares, 0, out=of_positions[1])
    return of_positions


def largest_mean(positions: Float64[Tensor, "*batch 2 positions"]) -> Float64[Tensor, "*batch"]:
    """The largest mean square among the positions that enough sequences reach; NaN if there is none
    or only a single position."""
    counts, squares = positions.unbind(-2)
    if counts.shape[-1] < 2:
        return counts.new_full(counts.shape[:-1], math.nan)
    largest = torch.where(counts >= LEAST_SEQUENCES, squares / counts, -math.inf).amax(-1)
    return largest.where(largest.isfinite(), math.nan)
