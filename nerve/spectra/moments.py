"""Number, mean and sum of squares of samples, accurate at any scale and with any mean.

The spread of the samples decides which products keep enough digits.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.spectra.host_copy import HostCopy
from nerve.spectra.product import PRODUCTS, Product, has_kernels

# Columns are scaled so that a centered value stays below 2**15: inside float16's range (65,504),
# with 39 binary digits between that and float16's smallest step.
_SCALED_EXPONENT = 15

# Uncentered products are for features whose squared mean is at most their variance, which keeps the
# error of SE below 1e-5. The features must also not be so small that products vanish in float32, or
# so large that sums of products overflow.
_LARGEST_MEAN = 1.0
_LEAST_SQUARE = 1e-30
_LARGEST_TOTAL = 1e37

_LARGEST_ROUNDING = 5e-5
"""The largest share of the variance that rounding may have if it is omitted: this changes SE by
less than 1e-3 nats."""

_ROWS = 8192


class Spread:
    """The mean of at least one sample, and the total squared distance from it.

    The methods wait for the device, as those of `HostCopy` do.

    Attributes:
        mean: float64 `[dim]`.

    Args:
        n: number of samples.
        mean: as the attribute.
        square: the total squared distance from it.
    """

    def __init__(self, n: int, mean: Float64[Tensor, " dim"], square: Float64[Tensor, ""]) -> None:
        self.mean = mean
        self._n = n
        self._squares = HostCopy(torch.stack([square, mean.dot(mean)]))

    def suits_raw(self) -> bool:
        """Whether products of the uncentered samples keep enough digits."""
        square, of_mean = self._of_all()
        all_squares = square + of_mean
        return (
            of_mean <= _LARGEST_MEAN * square
            and all_squares > _LEAST_SQUARE * self._n
            and all_squares < _LARGEST_TOTAL
        )

    def rounding_is_negligible(self, dtype: torch.dtype) -> bool:
        """Whether rounding the samples to `dtype` contributes at most 5e-5 of their variance.

        For normal and for skewed data, it contributes about `eps^2 / 22` of the mean square (less
        for evenly spread data); near 0, where steps do not shrink any further, `step^2 / 12`.
        """
        kind = torch.finfo(dtype)
        step = kind.tiny * kind.eps
        square, of_mean = self._of_all()
        rounding = (square + of_mean) * (kind.eps**2 / 22)
        rounding = rounding + self._n * len(self.mean) * (step**2 / 12)
        return rounding <= _LARGEST_ROUNDING * square

    def _of_all(self) -> tuple[float, float]:
        """The total squared distance from the mean, and `n |mean|^2`."""
        square, of_one = self._squares.numbers().tolist()
        return square, self._n * of_one

    @classmethod
    def of(cls, x: Float[Tensor, "n dim"]) -> "Spread":
        """The spread of `x`, in two passes over it."""
        sums = [rows.sum(0, dtype=torch.float32).double() for rows in x.split(_ROWS)]
        mean = torch.stack(sums).sum(0) / len(x)
        return cls(len(x), mean, square_distances(x, mean).sum())


def square_distances(
    x: Float[Tensor, "n dim"], mean: Float64[Tensor, " dim"]
) -> Float64[Tensor, " n"]:
    """The squared distance of each sample from `mean`, summed in float64; differences are taken in
    float32 for narrower features."""
    if not len(x):
        return mean.new_zeros(0)
    if x.dtype != torch.float64 and has_kernels(x.device):
        from nerve.spectra import kernels  # triton is not available everywhere

        return kernels.square_distances(x, mean)
    center = mean.to(torch.promote_types(x.dtype, torch.float32))
    pieces = [
        torch.linalg.vector_norm(rows - center, dim=1, dtype=torch.float64)
        for rows in x.split(_ROWS)
    ]
    return torch.cat(pieces).square()


class Moments(NamedTuple):
    """Number, mean and scatter matrix (the sum of squares about the mean) of samples.

    Only the lower triangle of the scatter matrix is valid.
    """

    n: int
    mean: Float64[Tensor, " dim"]
    scatter: Float64[Tensor, "dim dim"]


def moments_of(
    x: Float[Tensor, "n dim"], product: str, spread: Spread | None = None
) -> tuple[Moments, str]:
    """The moments of the samples `x`, at least one, and the name of the product that was used:
    `float16x2` instead of an uncentered product that would lose digits. If their spread is given,
    an uncentered product needs fewer passes over them."""
    with torch.autocast(x.device.type, enabled=False):
        if not PRODUCTS[product].centered:
            if x.dtype == PRODUCTS[product].dtype:
                spread = Spread.of(x) if spread is None else spread
                if spread.suits_raw():
                    return _raw_moments(x, PRODUCTS[product], spread), product
            product = "float16x2"
        return _centered_moments(x, PRODUCTS[product]), product


def prepare_centered(device: torch.device) -> None:
    """Compiles and loads the kernels of centered products of bfloat16 features; waits for them.

    Such features need them only once their mean is large. Compiling takes seconds, so it should
    happen while training goes on, in a separate thread: it uses a stream of its own and changes no
    setting. `device` must have kernels (`has_kernels`).
    """
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
        x = torch.ones(512, 128, dtype=torch.bfloat16, device=device)
        _centered_moments(x, PRODUCTS["float16x2"])
    stream.synchronize()


def _raw_moments(x: Float[Tensor, "n dim"], product: Product, spread: Spread) -> Moments:
    """The moments from products of uncentered samples: one pass over them.

    The rounding of `X^T X` is relative to the mean square, which is the variance plus the squared
    mean. So the covariance loses the digits by which that exceeds the variance.
    """
    m2 = spread.mean.new_zeros(x.shape[1], x.shape[1])
    for rows in x.split(product.n_rows):
        product.add(m2, rows)
    return Moments(len(x), spread.mean, m2.addr_(spread.mean, spread.mean, alpha=-len(x)))


def _centered_moments(x: Float[Tensor, "n dim"], product: Product) -> Moments:
    """The moments from products of centered samples.

    The samples are shifted by their mean, rounded to the working type. So each difference has all
    digits of that type, however large the mean is. The rest of the mean is measured on the shifted
    samples and subtracted in float64.
    """
    n = len(x)
    shift, scale = _shift_and_scale(x, product)
    rest = torch.zeros_like(shift, dtype=torch.float64)
    m2 = rest.new_zeros(len(rest), len(rest))
    for start in range(0, x.shape[0], product.n_rows):
        rows = slice(start, start + product.n_rows)
        # (x - shift) * scale in one kernel, without a copy of x in the wider type.
        y = torch.addcmul(-shift * scale, x[rows], scale).to(product.dtype)
        rest += y.sum(0)
        product.add(m2, y)
    rest /= n
    m2.addr_(rest, rest, alpha=-n)
    unscale = scale.double().reciprocal()
    return Moments(n, shift + rest * unscale, m2.mul_(unscale).mul_(unscale[:, None]))


def _shift_and_scale(
    x: Float[Tensor, "n dim"], product: Product
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """The approximate mean of each column, and the power of two that scales its range to
    `_SCALED_EXPONENT`."""
    dtype = torch.promote_types(x.dtype, product.dtype)
    low, high = (extreme.to(dtype) for extreme in torch.aminmax(x, dim=0))
    # A sum may overflow although its terms do not; the middle of the range is then close enough.
    total = x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)
    middle = torch.add(low / 2, high, alpha=0.5)
    mean = torch.where(total.abs() < torch.inf, total / x.shape[0], middle)
    # A dead column must have no variance at all: rounding may push the mean of equal values off
    # their value, but not past the extremes.
    shift = mean.clamp(low, high)
    # A constant column, which becomes 0, gets a scale that cannot make it overflow before the
    # shift.
    extent = torch.nn.functional.threshold(high.double() - low.double(), 0.0, 2.0**127)
    exponent = torch.frexp(extent).exponent.clamp(-100, 128)
    return shift, torch.pow(2.0, _SCALED_EXPONENT - exponent).to(dtype)
