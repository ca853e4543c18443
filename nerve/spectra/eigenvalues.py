"""The eigenvalues of a covariance, in float64, and two cheaper ways to the same numbers."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import pad

from nerve.errors import MeasurementError

# A covariance entry is trusted to 1e-5 of its two standard deviations, |E_ij| <= 1e-5 s_i s_j, so
# that no eigenvalue moves by more than |E|_F <= 1e-5 sum(s_i^2) = 1e-5 trace. (float64's own share
# is 1e-15 dim.) One further below zero cannot be rounding.
NEGATIVE_TOLERANCE = 1e-5


def eigenvalues(covariance: Float[Tensor, "*batch dim dim"]) -> Float64[Tensor, "*batch dim"]:
    """Eigenvalues of symmetric, positive semi-definite matrices, the largest first.

    Negative ones that are rounding, down to -1e-5 of the trace, become 0. A matrix with an entry
    that is not finite gives NaN throughout; the others of the batch are not affected.

    Args:
        covariance: only the lower triangle is read; any floating type, taken to float64.

    Returns:
        float64, in the units of the covariance, descending, each at least 0.

    Raises:
        MeasurementError: for an eigenvalue below -1e-5 of the trace.
    """
    with torch.no_grad():
        covariance = covariance.double()
        finite = covariance.isfinite().all(-1).all(-1)
        # LAPACK refuses NaN, for the whole batch.
        clean = torch.where(finite[..., None, None], covariance, 0)
        values = torch.linalg.eigvalsh(clean).flip(-1)
        values = _without_negatives(values, clean.diagonal(dim1=-2, dim2=-1).sum(-1))
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
    with torch.no_grad():
        x = x.reshape(-1, dim).double()
        n = x.shape[0]
        if n > dim:
            raise MeasurementError(
                f"The Gram matrix needs no more samples than features; got {n} samples of {dim} "
                "features. Use eigenvalues(covariance)."
            )
        if n < 2:
            return torch.full((dim,), torch.nan, dtype=torch.float64, device=x.device)
        x = x - x.mean(0)
        values = eigenvalues(x @ x.T / (n - 1))
        return _zero_padded(values, dim)


def projected_eigenvalues(
    weight: Float[Tensor, "d_ff d_in"], input_covariance: Float[Tensor, "d_in d_in"]
) -> Float64[Tensor, " d_ff"]:
    """Eigenvalues of `W C W^T`: the covariance of `u = W x + b` from that of `x`.

    With `C = R R^T`, `W C W^T = (W R) (W R)^T` has the same nonzero eigenvalues as the d_in x d_in
    matrix `(W R)^T (W R)`. R comes from the eigenvectors of C, `R = V sqrt(lambda)`, which exists
    and is stable when C is singular (behind a LayerNorm it always is), as a Cholesky factor is not.
    All in float64: relative to the largest, within 2e-10 of the d_ff x d_ff problem.

    Args:
        weight: the weight of the layer, as the forward that is measured used it.
        input_covariance: covariance of the layer's input.

    Returns:
        float64, descending, padded with zeros to `d_ff`; NaN if either argument is not finite.

    Raises:
        MeasurementError: if `input_covariance` has a materially negative eigenvalue.
    """
    d_ff, d_in = weight.shape
    with torch.no_grad():
        weight, covariance = weight.double(), input_covariance.double()
        if d_ff <= d_in:
            return eigenvalues(weight @ covariance @ weight.T)
        if not (weight.isfinite().all() & covariance.isfinite().all()):
            return torch.full((d_ff,), torch.nan, dtype=torch.float64, device=weight.device)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * _without_negatives(values, covariance.trace()).sqrt()
        projected = weight @ root
        return _zero_padded(eigenvalues(projected.T @ projected), d_ff)


def _zero_padded(values: Float64[Tensor, " n"], dim: int) -> Float64[Tensor, " dim"]:
    """`values` and zeros to make `dim`; all NaN if `values` are."""
    return torch.where(values.isnan().any(), torch.nan, pad(values, (0, dim - values.shape[0])))


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
