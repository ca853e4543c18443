"""How the variance is shared among the samples: whether the mean, or a few of them, hold it all."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

TOP = 1000
"""`top` is the share of the farthest sample in so many, rounded up: 0.1%."""

_LEAST_CANDIDATES = 64
_CANDIDATES_FOR_EACH_OF_THE_TOP = 4
_ROWS = 8192
_MOST_BOUNDS = 16
_TOLERANCE = 0.01


class Shares(NamedTuple):
    """What the mean and single samples have of the features' squares; NaN where it is not known.

    Attributes:
        mean: the mean's share of the second moment, `N |mean|^2 / sum |x|^2`, in [0, 1]; 1 where
            all samples are one vector, which centred spectra cannot see.
        largest: the share of all variance that the sample farthest from the mean has,
            `max |x - mean|^2 / sum |x - mean|^2`, in [1/N, 1 - 1/N].
        top: that of the farthest 0.1% of the samples, their number rounded up.
    """

    mean: float
    largest: float
    top: float


class _Bound(NamedTuple):
    """Samples that are not held lie within `radius` of `center`."""

    center: Float64[Tensor, " dim"]
    radius: Float64[Tensor, ""]


class SampleShares:
    """`Shares` over any number of updates, although the mean is known only at the end.

    Holds number, mean and total square of the samples (float64), and as candidates those that lie
    farthest from the mean so far: at least a quarter as many as there are features, and four times
    the top 0.1%. Of the others it keeps how far the farthest one was and from which mean. No sample
    moves farther against the mean than the mean itself does, which bounds what the others can add.
    A share that this bound could raise by more than 1% of itself is NaN. In one update nothing can;
    over several it takes a mean that wanders by more than the farthest samples stand out.

    Holds a sixteenth of what a covariance of bfloat16 features holds. No update waits for the
    device, but those with a mask.

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
        self._of_all: tuple[Tensor, Tensor] | None = None

    def update(
        self, x: Float[Tensor, "*samples dim"], mask: Bool[Tensor, "*samples"] | None = None
    ) -> None:
        """Adds samples. `x` is left as it is.

        Args:
            x: features; all dimensions but the last are samples.
            mask: True for the samples that count; what the others hold is ignored.
        """
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach().to(self.device).reshape(-1, self.dim)
            if mask is not None:
                x = x[mask.to(self.device).reshape(-1)]
            if not len(x):
                return
            self.n += len(x)
            move = (_mean(x) - self.mean) * (len(x) / self.n)
            self.mean += move
            squares = _squares(x, self.mean)
            self._square += squares.sum() + (self.n - len(x)) * move.square().sum()
            self._choose(x, squares)

    def shares(self) -> Float64[Tensor, "3"]:
        """`Shares` so far, on the device; all NaN below two samples, or if a feature of a sample
        was not finite."""
        with torch.inference_mode(False), torch.no_grad():
            if self.n < 2:
                return self._square.new_full((3,), math.nan)
            squares, reach = self._of_all or self.farthest(self.mean)
            n_top = -(-self.n // TOP)
            top = torch.nn.functional.pad(squares[:n_top], (0, max(0, n_top - len(squares))))
            of_mean = self.n * self.mean.square().sum()
            least = torch.stack([of_mean, top[0], top.sum()])
            most = torch.maximum(top, reach)
            most = torch.stack([of_mean, most[0], most.sum()])
            of = torch.stack([of_mean + self._square, self._square, self._square])
            known = (most <= least * (1 + _TOLERANCE)) & self._square.isfinite()
            return torch.where(known, least / of, math.nan)

    def square_about(self, mean: Float64[Tensor, " dim"]) -> Float64[Tensor, ""]:
        """The total squared distance of the samples from `mean`."""
        return self._square + self.n * (self.mean - mean).square().sum()

    def replace(
        self,
        n: int,
        mean: Float64[Tensor, " dim"],
        square: Float64[Tensor, ""],
        squares: Float64[Tensor, " k"],
        reach: Float64[Tensor, ""],
    ) -> None:
        """Takes other samples in place of its own; none can be added to them.

        Args:
            n, mean: their number and mean.
            square: their total squared distance from it.
            squares: the squared distances of the farthest ones, the largest first.
            reach: the square within which all others lie.
        """
        self.n, self.mean, self._square = n, mean, square
        self._of_all = squares, reach

    def n_candidates(self, n: int) -> int:
        """How many candidates are held of n samples."""
        top = _CANDIDATES_FOR_EACH_OF_THE_TOP * -(-n // TOP)
        return min(n, max(_LEAST_CANDIDATES, self.dim // 4, top))

    def _choose(self, x: Float[Tensor, "n dim"], squares: Float64[Tensor, " n"]) -> None:
        """Takes the candidates among those so far and `x`."""
        held = x[:0] if self._candidates is None else self._candidates
        squares = torch.cat([_squares(held, self.mean), squares])
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

    def farthest(self, mean: Tensor) -> tuple[Float64[Tensor, " n"], Float64[Tensor, ""]]:
        """The squared distances of the candidates to `mean`, the largest first, and the square
        within which all other samples lie."""
        held = self._candidates
        squares = mean.new_zeros(1) if held is None else _squares(held, mean)
        reach = mean.new_zeros(())
        for center, radius in self._bounds:
            reach = torch.maximum(reach, radius + (mean - center).norm())
        return squares.sort(descending=True).values, reach.square()


def _mean(x: Float[Tensor, "n dim"]) -> Float64[Tensor, " dim"]:
    """The mean of the samples, summed in float64; float32 holds the sum of so many rows of a type
    of 16 bits with as few bits lost, and a GPU adds it sooner."""
    dtype = torch.float64 if x.dtype.itemsize > 2 else torch.float32
    total = x.new_zeros(x.shape[1], dtype=torch.float64)
    for rows in x.split(_ROWS):
        total += rows.sum(0, dtype=dtype)
    return total / len(x)


def _squares(x: Float[Tensor, "n dim"], mean: Float64[Tensor, " dim"]) -> Float64[Tensor, " n"]:
    """The squared distance of each sample from `mean`, summed in float64; differences are taken in
    float32 for narrower features."""
    center = mean.to(torch.promote_types(x.dtype, torch.float32))
    pieces = [
        torch.linalg.vector_norm(rows - center, dim=1, dtype=torch.float64)
        for rows in x.split(_ROWS)
    ]
    return torch.cat(pieces).square() if pieces else mean.new_zeros(0)


def _rows_of(
    first: Float[Tensor, "n dim"], second: Float[Tensor, "m dim"], index: Int64[Tensor, " k"]
) -> Float[Tensor, "k dim"]:
    """`torch.cat([first, second])[index]` without a copy of both."""
    n = len(first)
    if not n:
        return second[index]
    of_second = second[(index - n).clamp(min=0)]
    return torch.where((index < n)[:, None], first[index.clamp(max=n - 1)], of_second)
