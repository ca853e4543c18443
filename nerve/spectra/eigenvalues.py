"""The eigenvalues of a covariance, in float64, and two cheaper ways to the same numbers."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra.product import add_lower

# A covariance entry is trusted to 1e-5 of its two standard deviations, |E_ij| <= 1e-5 s_i s_j, so
# that no eigenvalue moves by more than |E|_F <= 1e-5 sum(s_i^2) = 1e-5 trace. (float64's own share
# is 1e-15 dim.) One further below zero cannot be rounding.
NEGATIVE_TOLERANCE = 1e-5


def eigenvalues(
    covariance: Float[Tensor, "*batch n n"], dim: int | None = None
) -> Float64[Tensor, "*batch dim"]:
    """Eigenvalues of symmetric, positive semi-definite matrices, the largest first.

    Negative ones that are rounding, down to -1e-5 of the trace, become 0. A matrix with an entry
    that is not finite gives NaN throughout; the others of the batch are not affected.

    Args:
        covariance: only the lower triangle is read; any floating type, taken to float64.
        dim: how many to return, with zeros after those of the matrix. By default those alone.

    Returns:
        float64, in the units of the covariance, descending, each at least 0.

    Raises:
        MeasurementError: for an eigenvalue below -1e-5 of the trace.
    """
    with torch.no_grad():
        matrix = covariance.double()
        # The largest magnitude is NaN or infinite if any is.
        finite = matrix.tril().abs_().amax((-2, -1)).isfinite()
        if not finite.all():  # LAPACK refuses NaN, for the whole batch.
            matrix = torch.where(finite[..., None, None], matrix, 0)
        values = torch.linalg.eigvalsh(matrix).flip(-1)
        values = _without_negatives(values, matrix.diagonal(dim1=-2, dim2=-1).sum(-1))
        if dim is not None:
            values = torch.constant_pad_nd(values, (0, dim - values.shape[-1]))
        return torch.where(finite[..., None], values, torch.nan)


def gram_eigenvalues(x: Float[Tensor, "*samples dim"]) -> Float64[Tensor, " dim"]:
    """Eigenvalues of the covariance of `x`, from the Gram matrix of its samples.

    `(X - mean) (X - mean)^T / (N - 1)`, N x N, has the same nonzero eigenvalues as the dim x dim
    covariance; the other `dim - N` are 0. Much cheaper when there are fewer samples than features.

    Args:
        x: features of all N samples, N <= dim; all dimensions but the last are samples.

    Returns:
        float64, descending, padded with zeros to `dim`; NaN for N < 2 or features that are not
        finite.

    Raises:
        MeasurementError: if there are more samples than features.
    """
    dim = x.shape[-1]
    x = x.reshape(-1, dim)
    n = x.shape[0]
    if n > dim:
        raise MeasurementError(
            f"The Gram matrix needs no more samples than features; got {n} samples of {dim} "
            "features. Use eigenvalues(covariance)."
        )
    if n < 2:
        return torch.full((dim,), torch.nan, dtype=torch.float64, device=x.device)
    return eigenvalues(gram(x) / (n - 1), dim)


def gram(x: Float[Tensor, "n dim"]) -> Float64[Tensor, "n n"]:
    """`(X - mean) (X - mean)^T` of at least one sample, in float64: the lower triangle alone."""
    with torch.no_grad():
        x = x.double()
        # Equal values have no variance at all: rounding must not push their mean off them.
        x = x - x.mean(0).clamp(x.amin(0), x.amax(0))
        total = x.new_zeros(len(x), len(x))
        add_lower(total, x.T, x.T)
        return total


def projected_eigenvalues(
    weight: Float[Tensor, "d_ff d_in"], input_covariance: Float[Tensor, "d_in d_in"]
) -> Float64[Tensor, " d_ff"]:
    """Eigenvalues of `W C W^T`: the covariance of `u = W x + b` from that of `x`.

    With `W = Q R`, `W C W^T = Q (R C R^T) Q^T` has the same nonzero eigenvalues as the d_in x d_in
    matrix `R C R^T`. R exists and is stable for every W, and C may be singular, which behind a
    LayerNorm it always is. All in float64: relative to the largest, within 2e-10 of the d_ff x d_ff
    problem.

    Args:
        weight: the weight of the layer, as the forward that is measured used it.
        input_covariance: covariance of the layer's input; only the lower triangle is read.

    Returns:
        float64, in the units of the covariance, descending, padded with zeros to `d_ff`; NaN if
        either argument is not finite.

    Raises:
        MeasurementError: if `W C W^T` has a materially negative eigenvalue.
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
    """`values` with 0 in place of negative ones that are rounding; raises for others."""
    if (values < -NEGATIVE_TOLERANCE * trace.abs()[..., None]).any():
        relative = (values / trace.abs()[..., None]).amin().item()
        raise MeasurementError(
            f"The eigenvalues of a covariance cannot be negative; got {values.amin().item():.3g}, "
            f"{relative:.3g} of the trace, where rounding explains {-NEGATIVE_TOLERANCE:g}. The "
            "matrix is no covariance, or was accumulated in too low a precision."
        )
    return values.clamp(min=0)
