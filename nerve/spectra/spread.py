"""Where samples lie and how far apart: what must be known before their products are taken."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.spectra.flag import Flag
from nerve.spectra.product import has_kernels

# Uncentered products are for features whose mean carries at most the power of their variance, which
# keeps SE within 1e-5, and that are neither so small that products vanish in float32 nor so large
# that sums of them overflow.
_LARGEST_MEAN = 1.0
_LEAST_SQUARE = 1e-30
_LARGEST_TOTAL = 1e37

_LARGEST_ROUNDING = 5e-5
"""Share of the variance that rounding may have where it is left out: it moves SE by less than 1e-3
nats."""

_ROWS = 8192


class Spread:
    """The mean of samples, at least one, and their total squared distance from it.

    Attributes:
        mean: float64 `[dim]`.
        suits_raw: whether products of the samples as they are, uncentered, keep enough digits.

    Args:
        n: number of samples.
        mean: as the attribute.
        square: the total squared distance from it.
    """

    def __init__(self, n: int, mean: Float64[Tensor, " dim"], square: Float64[Tensor, ""]) -> None:
        self.mean = mean
        self._n, self._square = n, square
        of_mean = n * mean.dot(mean)
        self._all_squares = all_squares = square + of_mean
        self.suits_raw = Flag(
            (of_mean <= _LARGEST_MEAN * square)
            & (all_squares > _LEAST_SQUARE * n)
            & (all_squares < _LARGEST_TOTAL)
        )

    def is_left_by_rounding(self, dtype: torch.dtype) -> Flag:
        """Whether rounding the samples to `dtype` leaves their variance as it is, to 5e-5.

        Of normal and of skewed data rounding has about `eps^2 / 22` of the mean square (of evenly
        spread data less); near 0, where steps do not shrink any more, `step^2 / 12`.
        """
        kind = torch.finfo(dtype)
        step = kind.tiny * kind.eps
        rounding = self._all_squares * (kind.eps**2 / 22)
        rounding = rounding + self._n * len(self.mean) * (step**2 / 12)
        return Flag(rounding <= _LARGEST_ROUNDING * self._square)

    @classmethod
    def of(cls, x: Float[Tensor, "n dim"]) -> "Spread":
        """That of `x`, in two passes over it."""
        sums = [rows.sum(0, dtype=torch.float32).double() for rows in x.split(_ROWS)]
        mean = torch.stack(sums).sum(0) / len(x)
        return cls(len(x), mean, square_distances(x, mean).sum())


def square_distances(
    x: Float[Tensor, "n dim"], mean: Float64[Tensor, " dim"]
) -> Float64[Tensor, " n"]:
    """The squared distance of each sample from `mean`, summed in float64; differences are taken in
    float32 for narrower features."""
    center = mean.to(torch.promote_types(x.dtype, torch.float32))
    if not len(x):
        return mean.new_zeros(0)
    if center.dtype == torch.float32 and has_kernels(x.device):
        from nerve.spectra import kernels  # not everywhere is triton

        return kernels.square_distances(x, center)
    pieces = [
        torch.linalg.vector_norm(rows - center, dim=1, dtype=torch.float64)
        for rows in x.split(_ROWS)
    ]
    return torch.cat(pieces).square()
