"""How the variance is shared among the samples: whether the mean, a few of them, or those of one
position hold it all."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import pad

from nerve.spectra.moments import Spread, square_distances

TOP = 1000
"""`top` is the share of the farthest sample in so many, rounded up: 0.1%."""


LEAST_SEQUENCES = 8
"""A position counts where at least so many sequences reach it: fewer are single samples."""


_ROWS = 8192


_ROWS_OF_16_BITS = 32_768


_LEAST_CANDIDATES = 64
_CANDIDATES_FOR_EACH_OF_THE_TOP = 4
_MOST_BOUNDS = 16


class Shares(NamedTuple):
    """What the mean and single samples have of the features' squares; NaN where it is not known.

    Attributes:
        mean: the mean's share of the second moment, `N |mean|^2 / sum |x|^2`, in [0, 1]; 1 where
            all samples are one vector, which centered spectra cannot see.
        largest: the share of all variance that the sample farthest from the mean has,
            `max |x - mean|^2 / sum |x - mean|^2`, in [1/N, 1 - 1/N].
        top: that of the farthest 0.1% of the samples, their number rounded up.
        position: how far the samples of one position of the sequences are from the mean of all, as
            their mean squared distance over that of all samples, at the position where this is
            largest; 1 where all positions are alike. NaN where features have no positions, or
            none that `LEAST_SEQUENCES` reach.
    """

    mean: float
    largest: float
    top: float
    position: float


class _Bound(NamedTuple):
    """Samples that are not held lie within `radius` of `center`."""

    center: Float64[Tensor, " dim"]
    radius: Float64[Tensor, ""]


class Distances(NamedTuple):
    """Squared distances of samples from a mean.

    Attributes:
        farthest: those of the farthest samples, the largest first.
        reach: within this lie all others.
        positions: of each position of the sequences, the number of samples and their total.
    """

    farthest: Float64[Tensor, " k"]
    reach: Float64[Tensor, ""]
    positions: Float64[Tensor, "2 positions"]


class SampleShares:
    """`Shares` over any number of updates, although the mean is known only at the end.

    Holds number, mean and total square of the samples (float64), and as candidates those that lie
    farthest from the mean so far: at least a quarter as many as there are features, and four times
    the top 0.1%. Of the others it keeps how far the farthest one was and from which mean. No sample
    moves farther against the mean than the mean itself does, so that either the farthest samples
    are among the candidates for certain, or the share is NaN. In one update they always are; over
    several it takes a mean that wanders by more than the farthest samples stand out to lose them.

    Holds a sixteenth of what a covariance of bfloat16 features holds, and for each position of the
    sequences the sum of its samples (float64 `[positions, dim]`). No update waits for the device,
    but those with a mask.

    Args:
        dim: number of features.
        device: where the state lives; features from elsewhere are moved there.

    Source: ours.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None) -> None:
        self.dim = dim
        self.device = torch.device("cpu" if device is None else device)
        self.n = 0
        """Samples that counted so far."""
        self.mean = torch.zeros(dim, dtype=torch.float64, device=self.device)
        """Their mean, float64 `[dim]`."""
        self._square = torch.zeros((), dtype=torch.float64, device=self.device)
        self._candidates: Tensor | None = None
        self._bounds: list[_Bound] = []
        self._positions = Positions(dim, self.device)
        self._of_all: Distances | None = None

    def update(
        self, x: Float[Tensor, "*samples dim"], mask: Bool[Tensor, "*samples"] | None = None
    ) -> Spread | None:
        """Adds samples. `x` is left as it is.

        Args:
            x: features; all dimensions but the last are samples, of which the last one, where there
                are several, is the position in a sequence.
            mask: True for the samples that count; what the others hold is ignored.

        Returns:
            The spread of the samples that count, which a covariance of the same ones needs; None
            where there are none.
        """
        with torch.inference_mode(False), torch.no_grad():
            x, mask = x.detach().to(self.device), None if mask is None else mask.to(self.device)
            counted = x.reshape(-1, self.dim)
            if mask is not None:
                counted = counted[mask.reshape(-1)]
            n = len(counted)
            if not n:
                return None
            sums = self._positions.sums_of(x, mask)
            own_mean = sums.sum(0) / n
            self.n += n
            move = (own_mean - self.mean) * (n / self.n)
            self.mean += move
            squares = square_distances(counted, self.mean)
            square = squares.sum()
            # First of all, so that it is there when the covariance asks.
            spread = Spread(n, own_mean, square - n * (own_mean - self.mean).square().sum())
            self._square += square + (self.n - n) * move.square().sum()
            self._positions.add(sums, squares, self.mean, x.shape[:-1], mask)
            self._choose(counted, squares)
            return spread

    def shares(self) -> Float64[Tensor, "4"]:
        """`Shares` so far, on the device; all NaN below two samples, or if a feature of a sample
        was not finite."""
        with torch.inference_mode(False), torch.no_grad():
            if self.n < 2:
                return self._square.new_full((4,), math.nan)
            squares, reach, positions = self._of_all or self.about(self.mean)
            n_top = -(-self.n // TOP)
            top = pad(squares[:n_top], (0, max(0, n_top - len(squares))))
            of_mean = self.n * self.mean.square().sum()
            of_position = largest_mean(positions) / (self._square / self.n)
            always = self._square.isfinite()
            known = torch.stack([always, top[0] >= reach, top[-1] >= reach, always]) & always
            mean = of_mean / (of_mean + self._square)
            of_samples = torch.stack([top[0], top.sum()]) / self._square
            shares = torch.cat([mean[None], of_samples, of_position[None]])
            return torch.where(known, shares, math.nan)

    @property
    def n_positions(self) -> int:
        """The length of the longest sequence so far; 0 where features have no positions."""
        return self._positions.n

    def square_about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, ""]:
        """The total squared distance of the samples from `mean`."""
        return self._square + self.n * (self.mean - mean).square().sum()

    def replace(
        self, n: int, mean: Float64[Tensor, " dim"], square: Float64[Tensor, ""], of_all: Distances
    ) -> None:
        """Takes other samples in place of its own; none can be added to them.

        Args:
            n, mean: their number and mean.
            square: their total squared distance from it.
            of_all: as of `about(mean)`.
        """
        self.n, self.mean, self._square, self._of_all = n, mean, square, of_all

    def n_candidates(self, n: int) -> int:
        """How many candidates are held of n samples."""
        top = _CANDIDATES_FOR_EACH_OF_THE_TOP * -(-n // TOP)
        return min(n, max(_LEAST_CANDIDATES, self.dim // 4, top))

    def _choose(self, x: Float[Tensor, "n dim"], squares: Float64[Tensor, " n"]) -> None:
        """Takes the candidates among those so far and `x`."""
        held = x[:0] if self._candidates is None else self._candidates
        squares = torch.cat([square_distances(held, self.mean), squares])
        n_kept = self.n_candidates(self.n)
        if len(squares) <= n_kept:
            self._candidates = torch.cat([held, x])
            return
        values, index = squares.topk(n_kept + 1)
        self._candidates = _rows_of(held, x, index[:-1])
        self._bounds.append(_Bound(self.mean.clone(), values[-1].sqrt()))
        if len(self._bounds) > _MOST_BOUNDS:  # late means lie close together: little is lost
            last, earlier = self._bounds.pop(), self._bounds.pop()
            reach = earlier.radius + (last.center - earlier.center).norm()
            self._bounds.append(_Bound(last.center, torch.maximum(last.radius, reach)))

    def about(self, mean: Float64[Tensor, " dim"]) -> Distances:
        """The distances of the samples from `mean`; the farthest are those of the candidates."""
        held = self._candidates
        squares = mean.new_zeros(1) if held is None else square_distances(held, mean)
        reach = mean.new_zeros(())
        for center, radius in self._bounds:
            reach = torch.maximum(reach, radius + (mean - center).norm())
        farthest = squares.sort(descending=True).values
        return Distances(farthest, reach.square(), self._positions.about(mean))


def _rows_of(
    first: Float[Tensor, "n dim"], second: Float[Tensor, "m dim"], index: Int64[Tensor, " k"]
) -> Float[Tensor, "k dim"]:
    """`torch.cat([first, second])[index]` without a copy of both."""
    n = len(first)
    if not n:
        return second[index]
    of_second = second[(index - n).clamp(min=0)]
    return torch.where((index < n)[:, None], first[index.clamp(max=n - 1)], of_second)


class Positions:
    """The sum of the samples of each position, and of their squares, over any number of updates.

    The squares about any mean follow from these: float64 loses `1e-16 |mean|^2 / variance` of them.
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
        """The sums over the sequences, float64, but of float32 over rows of 16 bits, which loses as
        few bits of them and is sooner done on a GPU. Features without positions are all of one."""
        x = x.reshape(-1, x.shape[-2] if x.ndim > 2 else 1, self._dim)
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
        """Adds samples of this shape: their sums, as `sums_of` gives them, and the squared
        distances of those that count from `mean`, any vector."""
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
            self._sums = pad(self._sums, (0, 0, 0, longer))
            self._counts_and_squares = pad(self._counts_and_squares, (0, longer))
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
