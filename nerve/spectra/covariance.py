"""The covariance of features that arrive in batches, accurate at any scale and any mean."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra.eigenvalues import gram, mirrored
from nerve.spectra.moments import Moments, Spread, moments_of
from nerve.spectra.product import PRODUCTS, coarsest, default_product


class Tally(NamedTuple):
    """The number of samples in a covariance, and the products that were used for them."""

    n: int
    products: frozenset[str]


class StreamingCovariance:
    """Sample covariance `C = (X - mean)^T (X - mean) / (N - 1)` over any number of updates.

    Holds the number of samples, their mean (float64, `[dim]`) and the sum of squares about it
    (float64, `[dim, dim]`) on `device`, merged by Chan's formula. Within an update:

    - features are centered before they are multiplied if their mean could cost digits;
    - each column is scaled by a power of two, which is exact, so that no scale of the features
      over- or underflows in the product;
    - the product is taken in chunks of rows that are summed in float64.

    Up to `dim` samples, copies of the samples are held instead of moments, unless a `product` is
    named: they take no more memory, and `eigenproblem` is smaller for them.

    The error of an entry, relative to the two standard deviations, is that of the product: 1e-7 to
    a few 1e-6 for `float32` and `float16x2`, and 1e-15 for `float64`. For `bfloat16` it is relative
    to the whole variance, so entries of columns far smaller than the largest one can be inaccurate.
    No update records an autograd graph. Only updates with a mask, or with the product `bfloat16`,
    wait for the device. That product multiplies uncentered features; if their mean is too large for
    it, `float16x2` is used instead.

    Args:
        dim: number of features.
        device: where the state is kept and the products are computed; features from elsewhere are
            moved there. It must support float64. By default the CPU.
        product: how the products are computed, a key of `nerve.spectra.product.PRODUCTS`. By
            default `float64` for float64 features and, on an NVIDIA GPU, float32 ones; `bfloat16`
            for bfloat16 and `float16x2` for float16 features on an NVIDIA GPU; `float32` for
            others.

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
        self._held: list[Tensor] = []
        self._moments: Moments | None = None

    def update(
        self,
        x: Float[Tensor, "*samples dim"],
        mask: Bool[Tensor, "*samples"] | None = None,
        spread: Spread | None = None,
    ) -> None:
        """Adds samples. `x` is left as it is.

        Args:
            x: features; all dimensions but the last are samples.
            mask: True for the samples that count; what the others hold, NaN included, is ignored.
            spread: of the samples that count, if it is known.

        Raises:
            MeasurementError: if `x` does not end in `dim` features or `mask` has another shape than
                the samples.
        """
        self._check(x, mask)
        with torch.inference_mode(False), torch.no_grad():
            x = x.detach().to(self.device).reshape(-1, self.dim)
            if mask is not None:
                x = x[mask.to(self.device).reshape(-1)]
            if self._may_hold(x):
                self._held.append(x.clone())
            else:
                self._fold()
                self._add(x, spread)

    def merge(self, other: "StreamingCovariance") -> None:
        """Adds all samples of `other`, which is not changed.

        Raises:
            MeasurementError: if `other` has another `dim`.
        """
        if other.dim != self.dim:
            raise MeasurementError(
                "Only covariances of the same features can be merged; got dim = "
                f"{self.dim} and {other.dim}."
            )
        with torch.inference_mode(False), torch.no_grad():
            for held in tuple(other._held):
                self.update(held)
            if other._moments is not None:
                self._fold()
                self._taken |= other._taken
                n, *parts = other._moments
                self._merge(Moments(n, *(part.to(self.device, copy=True) for part in parts)))

    def tally(self) -> Tally:
        """The tally so far. Samples that are held become moments, because their product counts."""
        with torch.inference_mode(False), torch.no_grad():
            self._fold()
        n = 0 if self._moments is None else self._moments.n
        return Tally(n, self.products)

    def moments(self) -> Moments:
        """Number, mean and scatter (lower triangle) of the samples so far: the state itself."""
        with torch.inference_mode(False), torch.no_grad():
            return self._all_moments()

    def replace(self, moments: Moments, tallies: Sequence[Tally]) -> None:
        """Replaces the moments by those of all samples that the tallies count."""
        self._held.clear()
        self._moments = moments
        self._taken = set().union(*(tally.products for tally in tallies))

    def projected(
        self, weight: Float[Tensor, "d_out dim"], bias: Float[Tensor, " d_out"] | None
    ) -> "StreamingCovariance":
        """The covariance of `W x + b` of the same samples, from `W mean + b` and `W M2 W^T`."""
        with torch.inference_mode(False), torch.no_grad():
            n, mean, scatter = self._all_moments()
            w = weight.to(self.device).double()
            image = w @ mean if bias is None else w @ mean + bias.to(self.device).double()
            given = StreamingCovariance(len(w), device=self.device)
            given.replace(Moments(n, image, w @ mirrored(scatter) @ w.T), [self.tally()])
            return given

    def covariance(self) -> Float64[Tensor, "dim dim"]:
        """The covariance so far: exactly symmetric; all NaN below two samples, or if any feature of
        a sample was not finite."""
        with torch.inference_mode(False), torch.no_grad():
            n, _, scatter = self._all_moments()
            covariance = mirrored(scatter) / (n - 1 if n >= 2 else torch.nan)
            return torch.where(covariance.isfinite().all(), covariance, torch.nan)

    def scatter(self) -> Float64[Tensor, "dim dim"]:
        """`(N - 1) C` in the lower triangle; the upper triangle is undefined.

        A view of the state, valid until more samples are added. All zeros below two samples. If a
        feature was not finite, some entry of the lower triangle is not finite either.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self._all_moments().scatter

    def eigenproblem(self) -> Float64[Tensor, "n n"]:
        """The smallest matrix that has the nonzero eigenvalues of `scatter()`.

        `(X - mean) (X - mean)^T`, N x N, while the samples are held, and `scatter()` afterwards.
        Only the lower triangle is valid, and only until more samples are added.
        """
        with torch.inference_mode(False):
            samples = self.held_samples()
            return self.scatter() if samples is None else gram(samples)

    def held_samples(self) -> Float[Tensor, "n dim"] | None:
        """All samples, while they are held instead of moments; None afterwards, and if there are
        none."""
        with torch.inference_mode(False):
            return torch.cat(self._held) if self._n_held else None

    @property
    def products(self) -> frozenset[str]:
        """The products that were used so far; none while all samples are held."""
        return frozenset(self._taken)

    @property
    def n_samples(self) -> int:
        """Samples that counted so far."""
        return self._n_held + (0 if self._moments is None else self._moments.n)

    @property
    def precision(self) -> str:
        """How the products were computed, the least precise way if updates differed (see
        `product`); `float64` while all samples are held.

        Raises:
            MeasurementError: before the first update.
        """
        if self._held:
            return "float64"
        if not self._taken:
            raise MeasurementError(
                "A covariance has a precision only after its first update; there was none."
            )
        return coarsest(self._taken)

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

    @property
    def _n_held(self) -> int:
        return sum(len(samples) for samples in self._held)

    def _may_hold(self, x: Float[Tensor, "n dim"]) -> bool:
        fresh = self._moments is None and self._product is None
        return fresh and self._n_held + len(x) <= self.dim

    def _fold(self) -> None:
        """Replaces the held samples by their moments."""
        if self._held:
            samples = torch.cat(self._held)
            self._held.clear()
            self._add(samples)

    def _add(self, x: Float[Tensor, "n dim"], spread: Spread | None = None) -> None:
        name = self._product or default_product(x.dtype, self.device)
        if len(x):
            moments, name = moments_of(x, name, spread)
            self._merge(moments)
        self._taken.add(name)

    def _all_moments(self) -> Moments:
        self._fold()
        if self._moments is None:
            mean = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
            self._moments = Moments(0, mean, torch.diag(mean))
        return self._moments

    def _merge(self, other: Moments) -> None:
        """Adds the samples of `other`, whose tensors may become those of the state."""
        if self._moments is None:
            self._moments = other
            return
        n, mean, scatter = self._moments
        total = n + other.n
        if not total:
            return
        delta = other.mean - mean
        scatter.add_(other.scatter).addr_(delta * (n * other.n / total), delta)
        # Not in place: the mean of the first samples may belong to their spread.
        mean = mean + delta * (other.n / total)
        self._moments = Moments(total, mean, scatter)
