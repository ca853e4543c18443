"""The eigenvalues of a covariance, in float64, and two cheaper ways to compute them."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra.product import add_lower

NEGATIVE_TOLERANCE = 1e-5
"""How far below zero rounding can move an eigenvalue, relative to the trace.

The error of a covariance entry is at most 1e-5 of its two standard deviations, |E_ij| <= 1e-5 s_i
s_j. So no eigenvalue moves by more than |E|_F <= 1e-5 sum(s_i^2) = 1e-5 trace. The eigenvalue
computation in float64 adds only about 1e-15 dim."""


def eigenvalues(
    covariance: Float[Tensor, "*batch n n"], dim: int | None = None
) -> Float64[Tensor, "*batch dim"]:
    """Eigenvalues of symmetric, positive semi-definite matrices, the largest first.

    Eigenvalues that are negative because of rounding, down to -1e-5 of the trace, become 0. All
    eigenvalues of a matrix with an entry that is not finite are NaN; other matrices of the batch
    are not affected.

    Args:
        covariance: only the lower triangle is read; any floating type, converted to float64.
        dim: number of eigenvalues to return; zeros follow those of the matrix. By default n.

    Returns:
        float64, in the units of the covariance, descending, each at least 0.

    Raises:
        MeasurementError: for an eigenvalue below -1e-5 of the trace.
    """
    with torch.no_grad():
        matrix = covariance.double()
        # The largest magnitude is NaN or infinite if any entry is.
        finite = matrix.tril().abs_().amax((-2, -1)).isfinite()
        if not finite.all():  # because of one NaN, LAPACK would reject the whole batch
            matrix = torch.where(finite[..., None, None], matrix, 0)
        values = torch.linalg.eigvalsh(matrix).flip(-1)
        values = _without_negatives(values, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
        if dim is not None:
            values = torch.constant_pad_nd(values, (0, dim - values.shape[-1]))
        return torch.where(finite[..., None], values, torch.nan)


def gram(x: Float[Tensor, "n dim"]) -> Float64[Tensor, "n n"]:
    """The Gram matrix `(X - mean) (X - mean)^T` of at least one sample, in float64.

    Divided by N - 1, it has the same nonzero eigenvalues as the dim x dim covariance, and is much
    cheaper to solve if there are fewer samples than features. Only the lower triangle is valid.
    """
    with torch.no_grad():
        x = centered(x.double())
        total = x.new_zeros(len(x), len(x))
        add_lower(total, x.T, x.T)
        return total


def centered(x: Float64[Tensor, "n dim"]) -> Float64[Tensor, "n dim"]:
    """`X - mean` of at least one sample; exactly 0 for a feature that is the same in all samples,
    although its mean may be rounded."""
    return x - x.mean(0).clamp(x.amin(0), x.amax(0))


def projected_eigenvalues(
    weight: Float[Tensor, "d_ff d_in"], input_covariance: Float[Tensor, "d_in d_in"]
) -> Float64[Tensor, " d_ff"]:
    """Eigenvalues of `W C W^T`: the covariance of `u = W x + b` from that of `x`.

    With `W = Q R`, `W C W^T = Q (R C R^T) Q^T` has the same nonzero eigenvalues as the d_in x d_in
    matrix `R C R^T`. R exists and is stable for every W, and C may be singular, as it always is
    after a LayerNorm. All computations are in float64; the results differ from those of the
    d_ff x d_ff matrix by at most 2e-10 of the largest eigenvalue.

    Args:
        weight: the weight of the layer, as the measured forward pass used it.
        input_covariance: covariance of the layer's input; only the lower triangle is read.

    Returns:
        float64, in the units of the covariance, descending, padded with zeros to `d_ff`; all NaN if
        an entry of either argument is not finite.

    Raises:
        MeasurementError: if `W C W^T` has an eigenvalue below -1e-5 of its trace.
    """
    d_ff, d_in = weight.shape
    with torch.no_grad():
        factor = weight.double()
        if d_ff > d_in:
            factor = torch.linalg.qr(factor, mode="r").R
        covariance = mirrored(input_covariance.double())
        return eigenvalues(factor @ covariance @ factor.T, d_ff)


def mirrored(lower: Float64[Tensor, "dim dim"]) -> Float64[Tensor, "dim dim"]:
    """The symmetric matrix whose lower triangle is that of `lower`."""
    return lower.tril() + lower.tril(-1).T


def _without_negatives(
    values: Float64[Tensor, "*batch dim"], trace: Float64[Tensor, "*batch"]
) -> Float64[Tensor, "*batch dim"]:
    """`values`, with 0 in place of negative ones that rounding can explain; raises
    `MeasurementError` for others."""
    if (values < -NEGATIVE_TOLERANCE * trace.abs()[..., None]).any():
        relative = (values / trace.abs()[..., None]).amin().item()
        raise MeasurementError(
            f"The eigenvalues of a covariance cannot be negative; got {values.amin().item():.3g}, "
            f"{relative:.3g} of the trace, where rounding explains {-NEGATIVE_TOLERANCE:g}. The "
            "matrix is no covariance, or was accumulated in too low a precision."
        )
    return values.clamp(min=0)
