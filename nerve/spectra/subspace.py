"""What of the variance lies outside the directions that a layer's weight can reach."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.spectra.eigenvalues import mirrored

_WIDTH = 384
_ROUNDING = 4 * torch.finfo(torch.float32).eps
_CLEARLY_ITS_OWN = 1e-3
"""How far a column of unit length must lie from the span of those before it to be passed unseen."""


def variance_outside(
    weight: Float[Tensor, "dim d_in"],
    *,
    scatter: Float64[Tensor, "dim dim"] | None = None,
    samples: Float[Tensor, "n dim"] | None = None,
) -> Float64[Tensor, ""]:
    """The share of variance outside the span of the columns of `weight`, `1 - tr(P C) / tr(C)`.

    P is the orthogonal projector onto that span: all that `W x + b` can vary in. In [0, 1]: 0 for
    features that W x + b gives itself, `1 - rank(W)/dim` for variance that is spread evenly over
    all directions. NaN without variance, or where an entry is not finite. Sorted spectra cannot
    see it: a nonlinearity may move variance into new directions and leave the spectrum as it is.
    Source: ours.

    Args:
        weight: W of the layer before, as the forward that is measured used it.
        scatter: C, in any scale; the lower triangle alone is read.
        samples: in its place, the samples that C would be of; their mean does not count.
    """
    with torch.no_grad():
        basis = column_basis(weight)
        if samples is not None:
            centered = samples.double()
            centered = centered - centered.mean(0)
            inside, total = (centered @ basis).square().sum(), centered.square().sum()
        else:
            assert scatter is not None
            inside, total = _trace_of_projection(scatter, basis), scatter.trace()
        return (1 - inside / total).clamp(min=0)


def _trace_of_projection(
    scatter: Float64[Tensor, "dim dim"], basis: Float64[Tensor, "dim rank"]
) -> Float64[Tensor, ""]:
    """`tr(Q^T S Q)` from the lower triangle of S: the sum of `S * Q Q^T`, in block columns."""
    inside = scatter.new_zeros(())
    for start in range(0, len(scatter), _WIDTH):
        block, stop = scatter[start:, start : start + _WIDTH], start + _WIDTH
        projector = basis[start:] @ basis[start:stop].T
        inside += (mirrored(block[:_WIDTH]) * projector[:_WIDTH]).sum()
        inside += 2 * (block[_WIDTH:] * projector[_WIDTH:]).sum()
    return inside


def column_basis(weight: Float[Tensor, "dim d_in"]) -> Float64[Tensor, "dim rank"]:
    """An orthonormal basis of the span of the columns, each of which counts whatever its length.

    A direction that columns of unit length reach by less than the rounding of float32 is none: a
    product of two thin matrices has such. NaN throughout if an entry is not finite.
    """
    w = weight.double()
    if not w.isfinite().all():
        return torch.full_like(w, torch.nan)
    basis, factor = torch.linalg.qr(_unit_columns(w))
    if (factor.diagonal().abs() > _CLEARLY_ITS_OWN).all():
        return basis
    # Some column may be a combination of those before it, and its direction in `basis` arbitrary.
    left, values, _ = torch.linalg.svd(factor)
    return basis @ left[:, values > _ROUNDING * values[0]]


def _unit_columns(w: Float64[Tensor, "dim d_in"]) -> Float64[Tensor, "dim d_in"]:
    """Columns of unit length; those of zeros stay."""
    length = w.norm(dim=0)
    return w / torch.where(length > 0, length, 1)
