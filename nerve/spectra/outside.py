"""The share of variance after the nonlinearity in directions that its input cannot reach.

Sorted spectra cannot see it: a nonlinearity may move variance into new directions and leave the
spectrum as it is.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.spectra.eigenvalues import centered, mirrored
from nerve.spectra.triangle import lower_blocks

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Singular values below this share of the largest, for columns of unit length, are rounding."""

_CLEARLY_INDEPENDENT = 1e-3
"""If each column of unit length is farther than this from the span of the previous ones, the
columns are linearly independent beyond doubt."""


def variance_outside(
    weight: Float[Tensor, "dim d_in"],
    *,
    scatter: Float64[Tensor, "dim dim"] | None = None,
    samples: Float[Tensor, "n dim"] | None = None,
) -> Float64[Tensor, ""]:
    """The share of variance outside the span of the columns of `weight`, `1 - tr(P C) / tr(C)`.

    P is the orthogonal projector onto that span, which contains all variation of `W x + b`. In
    [0, 1]: 0 for features that are `W x + b`; `1 - rank(W)/dim` for variance that is equal in all
    directions. NaN without variance, or if an entry is not finite. Source: ours.

    Args:
        weight: W of the layer before, as the measured forward pass used it.
        scatter: C, at any scale; only the lower triangle is read.
        samples: instead of `scatter`, the samples; their mean does not matter.
    """
    with torch.no_grad():
        basis = column_basis(weight)
        if samples is not None:
            x = centered(samples.double())
            inside, total = (x @ basis).square().sum(), x.square().sum()
        else:
            assert scatter is not None
            inside, total = _trace_of_projection(scatter, basis), scatter.trace()
        return (1 - inside / total).clamp(min=0)


def _trace_of_projection(
    scatter: Float64[Tensor, "dim dim"], basis: Float64[Tensor, "dim rank"]
) -> Float64[Tensor, ""]:
    """`tr(Q^T S Q)` from the lower triangle of S: the sum of `S * Q Q^T`, in block columns."""
    inside = scatter.new_zeros(())
    for block in lower_blocks(scatter):
        n, width = block.shape
        rows = basis[-n:]
        projector = rows @ rows[:width].T
        inside += (mirrored(block[:width]) * projector[:width]).sum()
        inside += 2 * (block[width:] * projector[width:]).sum()
    return inside


def column_basis(weight: Float[Tensor, "dim d_in"]) -> Float64[Tensor, "dim rank"]:
    """An orthonormal basis of the span of the columns, whatever their lengths.

    Directions that exist only because of float32 rounding do not count; a product of two thin
    matrices has such directions. All NaN if an entry is not finite.
    """
    w = weight.double()
    if not w.isfinite().all():
        return torch.full_like(w, torch.nan)
    basis, factor = torch.linalg.qr(_unit_columns(w))
    if (factor.diagonal().abs() > _CLEARLY_INDEPENDENT).all():
        return basis
    # The direction in `basis` of a column that is a combination of the previous ones is arbitrary.
    left, values, _ = torch.linalg.svd(factor)
    return basis @ left[:, values > _ROUNDING * values[0]]


def _unit_columns(w: Float64[Tensor, "dim d_in"]) -> Float64[Tensor, "dim d_in"]:
    """The columns scaled to unit length; columns of zeros are unchanged."""
    length = w.norm(dim=0)
    return w / torch.where(length > 0, length, 1)
