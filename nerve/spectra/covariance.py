"""The covariance of features that arrive in batches, accurate at any scale and any mean."""

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra.product import PRODUCTS, Product, default_product, exact_products

# Columns are scaled so that a centred value stays below 2**15: inside float16's range (65,504),
# with 39 binary digits between that and float16's smallest step.
_SCALED_EXPONENT = 15

# Uncentred products are for features whose mean carries at most a quarter of the power of their
# variance, which keeps SE within 1e-5, and that are not so small that products vanish.
_LARGEST_MEAN = 0.25
_LEAST_SQUARE = 1e-30


class StreamingCovariance:
    """Sample covariance `C = (X - mean)^T (X - mean) / (N - 1)` over any number of updates.

    Holds the number of samples, their mean (float64, `[dim]`) and the sum of squares about it
    (float64, `[dim, dim]`) on `device`, merged by Chan's formula. Within an update:

    - features are centred before they are multiplied wherever a mean could cost digits;
    - each column is scaled by a power of two, which is exact, so that no scale of the features
      over- or underflows in the product;
    - the product is taken in chunks of rows that are summed in float64.

    The error of an entry, relative to the two standard deviations, is that of the product: 1e-7 to
    a few 1e-6 for `float32` and the 16-bit ones, 1e-15 for `float64`. No update records an autograd
    graph, and only those of `bfloat16` wait for the device: these products take the features
    uncentred, and where the mean turns out to be too large for that, the update is done again with
    `float16x2`.

    Args:
        dim: number of features.
        device: where the state lives and the products are taken; features from elsewhere are moved
            there. It must have float64. By default the CPU.
        product: how the products are taken, a name of `nerve.spectra.product.PRODUCTS`. By default
            `float64` for float64 features and, on an NVIDIA GPU, float32 ones; `bfloat16` for
            bfloat16 and `float16x2` for float16 features on an NVIDIA GPU; `float32` for others.

    Raises:
        MeasurementError: for a `dim` below 1 or an unknown `product`.

    Source: Chan, Golub & LeVeque (1979) for the merge; the rest is ours.
    """

    def __init__(
        self, dim: int, *, device: torch.device | str | None = None, product: str | None = None
    ) -> None:
        if dim < 1:
            raise MeasurementError(f"A covariance needs at least one feature; got dim = {dim}.")
        if product is not None and product not in PRODUCTS:
            raise MeasurementError(
                f"product must be one of {', '.join(PRODUCTS)}, or None; got {product!r}."
            )
        self.dim = dim
        self.device = torch.device("cpu" if device is None else device)
        self._product = product
        self._taken: set[str] = set()
        # State made outside inference mode can be updated inside and outside of it.
        with torch.inference_mode(False):
            self._n = torch.zeros((), dtype=torch.float64, device=self.device)
            self._mean = self._n.new_zeros(dim)
            self._m2 = self._n.new_zeros(dim, dim)

    def update(
        self,
        x: Float[Tensor, "*samples dim"],
        mask: Bool[Tensor, "*samples"] | None = None,
    ) -> None:
        """Adds samples. `x` is left as it is.

        Args:
            x: features; all dimensions but the last are samples.
            mask: True for the samples that count; what the others hold, NaN included, is ignored.

        Raises:
            MeasurementError: if `x` does not end in `dim` features or `mask` has another shape than
                the samples.
        """
        self._check(x, mask)
        if x.numel() == 0:
            return
        name = self._product or default_product(x.dtype, self.device)
        with torch.inference_mode(False), torch.no_grad(), exact_products(self.device):
            x = x.detach().to(self.device).reshape(-1, self.dim)
            if mask is not None:
                mask = mask.to(self.device).reshape(-1)
            moments = None
            if not PRODUCTS[name].centred:
                if x.dtype == PRODUCTS[name].dtype:
                    moments = _raw_moments(x, mask, PRODUCTS[name])
                name = name if moments else "float16x2"
            self._merge(*(moments or _moments(x, mask, PRODUCTS[name])))
            self._taken.add(name)

    def merge(self, other: "StreamingCovariance") -> None:
        """Adds all samples that `other` has seen; `other` is left as it is.

        Raises:
            MeasurementError: if `other` has another `dim`.
        """
        if other.dim != self.dim:
            raise MeasurementError(
                "Only covariances of the same features can be merged; got dim = "
                f"{self.dim} and {other.dim}."
            )
        self._taken |= other._taken
        with torch.inference_mode(False), torch.no_grad():
            self._merge(*(part.to(self.device) for part in (other._n, other._mean, other._m2)))

    def all_reduce(self) -> None:
        """Adds the samples of all processes of the default group, in each of them.

        Every process must call it, on accumulators of one `dim`; one may have seen no samples.
        """
        with torch.inference_mode(False), torch.no_grad():
            n, total, mean = self._n.clone(), self._n, self._mean * self._n
            dist.all_reduce(total)
            dist.all_reduce(mean)
            mean /= total.clamp(min=1)
            delta = self._mean - mean
            self._m2.addr_(delta * n, delta)
            dist.all_reduce(self._m2)
            self._mean = mean
            taken = n.new_tensor([name in self._taken for name in PRODUCTS])
            dist.all_reduce(taken, dist.ReduceOp.MAX)
            self._taken = {name for name, any_ in zip(PRODUCTS, taken, strict=True) if any_}

    def covariance(self) -> Float64[Tensor, "dim dim"]:
        """The covariance so far: exactly symmetric; all NaN below two samples, or if any feature of
        a sample was not finite."""
        with torch.inference_mode(False), torch.no_grad():
            degrees = torch.where(self._n >= 2, self._n - 1, torch.nan)
            covariance = (self._m2 + self._m2.T) / (2 * degrees)
            return torch.where(covariance.isfinite().all(), covariance, torch.nan)

    @property
    def n_samples(self) -> int:
        """Samples that counted so far. Waits for the device."""
        return int(self._n.item())

    @property
    def precision(self) -> str:
        """How the products were taken, the coarsest way if updates differed (see `product`).

        Raises:
            MeasurementError: before the first update.
        """
        for name in PRODUCTS:
            if name in self._taken:
                return name
        raise MeasurementError("A covariance has a precision from its first update on; got none.")

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim == 0 or x.shape[-1] != self.dim or not x.is_floating_point():
            raise MeasurementError(
                f"Features must be floating-point and end in a dimension of {self.dim}; got "
                f"{x.dtype} of shape {tuple(x.shape)}."
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise MeasurementError(
                f"A mask must have one boolean a sample, {tuple(x.shape[:-1])}; got {mask.dtype} "
                f"of shape {tuple(mask.shape)}."
            )

    def _merge(
        self,
        n: Float64[Tensor, ""],
        mean: Float64[Tensor, " dim"],
        m2: Float64[Tensor, "dim dim"],
    ) -> None:
        total = (self._n + n).clamp(min=1)
        delta = mean - self._mean
        self._m2.add_(m2).addr_(delta * (self._n * n / total), delta)
        self._mean.add_(delta * (n / total))
        self._n.add_(n)


def _raw_moments(
    x: Float[Tensor, "n dim"], mask: Bool[Tensor, " n"] | None, product: Product
) -> tuple[Float64[Tensor, ""], Float64[Tensor, " dim"], Float64[Tensor, "dim dim"]] | None:
    """As `_moments`, from products of the samples as they are: one pass over them.

    `X^T X` is rounded relative to the mean square, variance and squared mean together, so the
    covariance loses the digits by which they exceed the variance. None where that, or the scale of
    the features, would cost more than a trifle; to know it is to wait for the device once.
    """
    n = torch.full((), len(x), dtype=torch.float64, device=x.device)
    if mask is not None:
        n, x = mask.sum(dtype=torch.float64), x.masked_fill(~mask[:, None], 0)
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    m2 = torch.diag(total)
    for rows in x.split(product.n_rows):
        total += rows.sum(0, dtype=torch.float32)
        product.add(m2, rows)
    mean = total / n.clamp(min=1)
    squares = m2.trace()
    of_mean = n * mean.dot(mean)
    fits = (of_mean <= _LARGEST_MEAN * (squares - of_mean)) & (squares > _LEAST_SQUARE * n)
    if not (fits & squares.isfinite()):
        return None
    return n, mean, m2.addr_(mean * n, mean, alpha=-1)


def _moments(
    x: Float[Tensor, "n dim"], mask: Bool[Tensor, " n"] | None, product: Product
) -> tuple[Float64[Tensor, ""], Float64[Tensor, " dim"], Float64[Tensor, "dim dim"]]:
    """Number, mean and sum of squares about the mean of the samples `x` that `mask` selects.

    The samples are shifted by their mean, rounded to the working type. Each difference then has all
    digits of that type, however large the mean; and what is left of the mean is measured on the
    shifted samples and taken out in float64.
    """
    if mask is None:
        n = torch.full((), x.shape[0], dtype=torch.float64, device=x.device)
    else:
        n = mask.sum(dtype=torch.float64)
        x = _fill_unmasked(x, mask)
    shift, scale = _shift_and_scale(x, product)
    rest = torch.zeros_like(shift, dtype=torch.float64)
    m2 = torch.diag(rest)
    for start in range(0, x.shape[0], product.n_rows):
        rows = slice(start, start + product.n_rows)
        # (x - shift) * scale in one kernel, without a copy of x in the wider type.
        y = torch.addcmul(-shift * scale, x[rows], scale).to(product.dtype)
        if mask is not None:
            y.masked_fill_(~mask[rows, None], 0)
        rest += y.sum(0, dtype=torch.float64)
        product.add(m2, y)
    rest /= n.clamp(min=1)
    m2.addr_(rest * n, rest, alpha=-1)
    unscale = scale.double().reciprocal()
    return n, shift + rest * unscale, m2.mul_(unscale).mul_(unscale[:, None])


def _shift_and_scale(
    x: Float[Tensor, "n dim"], product: Product
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """The mean of each column, and the power of two that takes its range to `_SCALED_EXPONENT`."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(product.n_rows):
        total += chunk.sum(0, dtype=torch.float64)
    dtype = torch.promote_types(x.dtype, product.dtype)
    low, high = x.amin(0).to(dtype), x.amax(0).to(dtype)
    # A dead column must have no variance at all: rounding may push the mean of equal values off
    # their value, but not past the extremes.
    shift = (total / x.shape[0]).to(dtype).clamp(low, high)
    exponent = torch.frexp(high.double() - low.double()).exponent.clamp(-100, 128)
    return shift, torch.ldexp(torch.ones_like(shift), _SCALED_EXPONENT - exponent)


def _fill_unmasked(x: Float[Tensor, "n dim"], mask: Bool[Tensor, " n"]) -> Float[Tensor, "n dim"]:
    """`x` with the first sample that counts in place of those that don't, or zeros if none counts.

    They are to be zeroed once centred, and must not stretch the range until then. To select rows by
    the mask would be to wait for the device to tell how many they are.
    """
    first = x.index_select(0, mask.to(torch.uint8).argmax(0, keepdim=True))
    return torch.where(mask[:, None], x, torch.where(mask.any(), first, 0))
