"""How much of the features' squares the mean, single samples and single positions account for."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from nerve.spectra.moments import Spread, square_distances
from nerve.spectra.positions import (
    Padding,
    Positions,
    counts_and_squares,
    largest_mean,
    sums_of_positions,
)

TOP = 1000
"""`top` is the share of the farthest sample in so many, rounded up: 0.1%."""

_LEAST_CANDIDATES = 64
_CANDIDATES_FOR_EACH_OF_THE_TOP = 4
_MOST_BOUNDS = 16


class Shares(NamedTuple):
    """The shares of the mean, of single samples and of one position; NaN where they are unknown.

    Attributes:
        mean: the mean's share of the second moment, `N |mean|^2 / sum |x|^2`, in [0, 1]; 1 where
            all samples are the same vector, which centered spectra cannot show.
        largest: the share of the variance that the sample farthest from the mean accounts for,
            `max |x - mean|^2 / sum |x - mean|^2`, in [1/N, 1 - 1/N].
        top: that of the farthest 0.1% of the samples, their number rounded up.
        position: the mean squared distance of the samples at one sequence position from the mean of
            all samples, divided by that of all samples, at the position where this is largest; 1 if
            all positions are alike. Positions count after left padding. NaN if features have no
            positions, or none that at least `LEAST_SEQUENCES` sequences reach.
    """

    mean: float
    largest: float
    top: float
    position: float


class _Bound(NamedTuple):
    """A ball around `center` that contains samples that are not held."""

    center: Float64[Tensor, " dim"]
    radius: Float64[Tensor, ""]


class Distances(NamedTuple):
    """Squared distances of samples from a mean.

    Attributes:
        farthest: those of the candidates, in any order.
        reach: all other samples are within this distance, which is not squared.
        positions: for each sequence position, the number of samples and the sum of their squared
            distances.
    """

    farthest: Float64[Tensor, " k"]
    reach: Float64[Tensor, ""]
    positions: Float64[Tensor, "2 positions"]


class SampleShares:
    """`Shares` over any number of updates, although the mean is known only at the end.

    Holds the number, mean and total squared distance of the samples (float64), and copies of the
    candidates: the samples farthest from the mean so far, at least a quarter as many as there are
    features and four times the top 0.1%. For the other samples it holds balls that contain them,
    around the means of the updates that dropped them. A mean that moves by some distance changes
    the distance of no sample by more than that. So either the farthest samples are certainly among
    the candidates, or the share is NaN. After one update they always are; several updates lose them
    only if the mean moves by more than the farthest samples stand out.

    Takes a sixteenth of the memory of a covariance of bfloat16 features, and for each sequence
    position the sum of its samples (float64 `[positions, dim]`). Only updates with a mask wait for
    the device. With small models, the host's launches of kernels take the time; therefore the first
    update moves and merges nothing, and `shares_of` reads many instances at once.

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
        self._mean: Tensor | None = None
        self._square: Tensor | None = None
        self._candidates: Tensor | None = None
        self._farthest: Tensor | None = None  # their squared distances from the mean
        self._bounds: list[_Bound] = []
        self._positions = Positions()
        self._of_all: Distances | None = None

    @property
    def mean(self) -> Float64[Tensor, " dim"]:
        """The mean of the samples so far, a tensor that is never modified; zeros before the first
        one."""
        if self._mean is None:
            self._mean = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        return self._mean

    @property
    def square(self) -> Float64[Tensor, ""]:
        """The total squared distance of the samples so far from `mean`."""
        return self.mean.new_zeros(()) if self._square is None else self._square

    def update(
        self,
        x: Float[Tensor, "*samples dim"],
        mask: Bool[Tensor, "*samples"] | None = None,
        unpadded: Bool[Tensor, "*samples"] | None = None,
    ) -> Spread | None:
        """Adds samples. `x` is left as it is.

        Args:
            x: features; all dimensions but the last are samples. If there are several, the last of
                them is the position in a sequence, from its first sample that is no padding.
            mask: True for the samples that count; what the others hold is ignored.
            unpadded: True for those that are no padding; None if all that do not count are.

        Returns:
            The spread of the samples that count, which a covariance of the same samples needs; None
            if none count.
        """
        assert self._of_all is None, "after replace(), no samples can be added"
        with torch.inference_mode(False), torch.no_grad():
            x, mask = x.detach().to(self.device), None if mask is None else mask.to(self.device)
            counted = x.reshape(-1, self.dim)
            if mask is not None:
                counted = counted[mask.reshape(-1)]
            n, before = len(counted), self.n
            if not n:
                return None
            sequences = x.reshape(-1, x.shape[-2] if x.ndim > 2 else 1, self.dim)
            padding = None
            if mask is not None:
                own = mask if unpadded is None else unpadded.to(self.device)
                padding = Padding.of(*(each.reshape(sequences.shape[:2]) for each in (mask, own)))
            sums = sums_of_positions(sequences, padding)
            own_mean = sums.sum(0).div_(n)
            self.n += n
            move = None if not before else (own_mean - self.mean) * (n / self.n)
            self._mean = own_mean if move is None else self.mean + move
            squares = square_distances(counted, self.mean)
            of_positions = counts_and_squares(squares, len(sums), padding)
            square = own_square = of_positions[1].sum()
            if move is not None:
                # own_mean - mean = move * before / n
                moved = move.dot(move)
                own_square = torch.sub(square, moved, alpha=before**2 / n)
                square = torch.add(self.square + square, moved, alpha=before)
            # Before the rest, so that the numbers have arrived when the covariance reads them.
            spread = Spread(n, own_mean, own_square)
            self._square = square
            self._positions.add(sums, of_positions, self.mean, are_there=x.ndim > 2)
            self._choose(counted, squares)
            return spread

    def shares(self) -> Float64[Tensor, "4"]:
        """`Shares` so far, on the device; all NaN below two samples, or if a feature of a sample
        was not finite."""
        return shares_of([self])[0]

    @property
    def n_positions(self) -> int:
        """The length of the longest sequence so far; 0 where features have no positions."""
        return self._positions.n

    def square_about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, ""]:
        """The total squared distance of the samples from `mean`."""
        return self.square + self.n * (self.mean - mean).square().sum()

    def replace(
        self, n: int, mean: Float64[Tensor, " dim"], square: Float64[Tensor, ""], of_all: Distances
    ) -> None:
        """Replaces the samples by others, to which none can be added.

        Args:
            n, mean: their number and mean.
            square: their total squared distance from the mean.
            of_all: what `about(mean)` would return for them.
        """
        self.n, self._mean, self._square, self._of_all = n, mean, square, of_all

    def n_candidates(self, n: int) -> int:
        """How many candidates are held if there are n samples."""
        top = _CANDIDATES_FOR_EACH_OF_THE_TOP * -(-n // TOP)
        return min(n, max(_LEAST_CANDIDATES, self.dim // 4, top))

    def _choose(self, x: Float[Tensor, "n dim"], squares: Float64[Tensor, " n"]) -> None:
        """Chooses the candidates among the previous ones and `x`."""
        held = self._candidates
        if held is not None:
            squares = torch.cat([square_distances(held, self.mean), squares])
        n_kept = self.n_candidates(self.n)
        if len(squares) <= n_kept:
            self._candidates = x.clone() if held is None else torch.cat([held, x])
            self._farthest = squares
            return
        values, index = squares.topk(n_kept + 1)
        self._candidates = _rows_of(held, x, index[:-1])
        self._farthest = values[:-1]
        self._bounds.append(_Bound(self.mean, values[-1].sqrt()))
        if len(self._bounds) > _MOST_BOUNDS:
            # The last means are close together, so one ball around two loses little.
            last, earlier = self._bounds.pop(), self._bounds.pop()
            reach = earlier.radius + (last.center - earlier.center).norm()
            self._bounds.append(_Bound(last.center, torch.maximum(last.radius, reach)))

    def about(self, mean: Float64[Tensor, " dim"]) -> Distances:
        """The distances of the samples from `mean`."""
        if self._candidates is None or self._farthest is None:
            farthest = mean.new_zeros(1)
        elif mean is self.mean:
            farthest = self._farthest
        else:
            farthest = square_distances(self._candidates, mean)
        reach = [
            radius if center is mean else radius + (mean - center).norm()
            for center, radius in self._bounds
        ]
        most = reach[0] if len(reach) == 1 else torch.stack([mean.new_zeros(()), *reach]).max()
        return Distances(farthest, most, self._positions.about(mean))

    def distances(self) -> Distances:
        """The distances from the mean of all samples, after `replace` of those given there."""
        return self._of_all or self.about(self.mean)


def shares_of(several: Sequence[SampleShares]) -> list[Float64[Tensor, "4"]]:
    """`SampleShares.shares` of each. Those of the same size are read together, with as many kernels
    as a single one."""
    with torch.inference_mode(False), torch.no_grad():
        distances = [each.distances() for each in several]
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for index, (each, d) in enumerate(zip(several, distances, strict=True)):
            sizes = (each.n, each.dim, d.farthest.shape, d.positions.shape)
            alike[each.device, sizes].append(index)
        found: dict[int, Tensor] = {}
        for indices in alike.values():
            some = [several[index] for index in indices]
            rows = _shares_of_alike(some, [distances[index] for index in indices])
            found.update(zip(indices, rows, strict=True))
        return [found[index] for index in range(len(several))]


def _shares_of_alike(
    several: Sequence[SampleShares], distances: Sequence[Distances]
) -> Float64[Tensor, "several 4"]:
    """`shares_of` for those with equal numbers of samples, features, candidates and positions."""
    n, square = several[0].n, torch.stack([each.square for each in several])
    if n < 2:
        return square.new_full((len(several), 4), math.nan)
    farthest, reach, positions = (torch.stack(each) for each in zip(*distances, strict=True))
    reach = reach.square()
    top = farthest.topk(-(-n // TOP)).values
    of_mean = n * torch.stack([each.mean for each in several]).square().sum(1)
    of_position = largest_mean(positions) / (square / n)
    always = square.isfinite()
    known = torch.stack([always, top[:, 0] >= reach, top[:, -1] >= reach, always], 1)
    mean = of_mean / (of_mean + square)
    of_samples = top[:, 0] / square, top.sum(1) / square
    shares = torch.stack([mean, *of_samples, of_position], 1)
    return shares.where(known & always[:, None], math.nan)


def _rows_of(
    first: Float[Tensor, "n dim"] | None, second: Float[Tensor, "m dim"], index: Int64[Tensor, " k"]
) -> Float[Tensor, "k dim"]:
    """`torch.cat([first, second])[index]` without a copy of both."""
    if first is None:
        return second[index]
    n = len(first)
    of_second = second[(index - n).clamp(min=0)]
    return torch.where((index < n)[:, None], first[index.clamp(max=n - 1)], of_second)
