"""What an eigenvalue spectrum says: how many directions the features use, and how evenly.

All take eigenvalues as they are, `[*batch, dim]`, in any order and any units, and use the shares
`p = lambda / sum(lambda)` in float64. There is no additive constant anywhere, so that the results
do not depend on the scale of the features. A spectrum that has no shares (zero variance, an entry
that is negative or not finite, no entry at all) gives NaN, never a number. `variance_outside`
says of a covariance itself what sorted spectra cannot.

Source: NerVE (Jha & Reagen, ICLR 2026, arXiv 2603.06922).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from nerve.spectra.eigenvalues import mirrored


def spectral_entropy(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """Spectral entropy `SE = -sum(p ln p)`, with `0 ln 0 = 0`, in nats.

    In [0, ln dim]: 0 if one direction holds all variance, ln dim for a flat spectrum. `exp(SE)` is
    an effective number of directions in which small eigenvalues count for more than in the
    participation ratio. Source: NerVE's SE.
    """
    return torch.special.entr(_shares(eigenvalues)).sum(-1)


def participation_ratio(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """Participation ratio `PR = sum(lambda)^2 / sum(lambda^2) = 1 / sum(p^2)`, in directions.

    In [1, dim]: 1 if one direction holds all variance, dim for a flat spectrum. Source: NerVE's PR.
    """
    return _shares(eigenvalues).square().sum(-1).reciprocal()


def corrected_participation_ratio(
    participation_ratio: Float[Tensor, "*batch"], n_samples: int
) -> Float64[Tensor, "*batch"]:
    """The participation ratio without the bias of a finite sample, `1 / (1/PR - 1/N)`.

    A covariance of N samples reads `1/PR_measured ~ 1/PR + 1/N` if they are independent; those of
    one sequence are not, and the correction is then too small. NaN where it cannot be trusted:
    below two samples a direction, `N < 2 PR`, which covers wherever `1/PR - 1/N` is not positive.
    In [1, N]. Source: ours.
    """
    measured = participation_ratio.double()
    corrected = measured / (1 - measured / max(n_samples, 1))
    return torch.where(n_samples >= 2 * measured, corrected, torch.nan)


def eigenvalue_early_enrichment(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """Eigenvalue early enrichment `EEE = (2/dim) sum_k (S_k - k/dim)`, `S_k` the k largest shares.

    How far the cumulative spectrum lies above that of a flat one; exactly the Gini coefficient of
    the eigenvalues. In [0, 1 - 1/dim]: 0 for a flat spectrum, 1 - 1/dim if one direction holds all
    variance. Source: NerVE's EEE.
    """
    p = _shares(eigenvalues)
    return (p * _early_weights(p)).sum(-1).clamp(min=0)


def jensen_shannon(
    pre: Float[Tensor, "*batch dim"], post: Float[Tensor, "*batch dim"]
) -> Float64[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two spectra, the k-th largest share against the k-th, in nats.

    `JS = KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`, p and q the sorted shares of
    `pre` and `post`. Symmetric. In [0, ln 2), 0 for equal shapes; ln 2 is never reached, since both
    peak first. One direction against a flat spectrum gives, with D = dim,
    `[ln(2D/(D+1)) + ln(2/(D+1))/D + (1 - 1/D) ln 2] / 2`. Source: NerVE's JS.
    """
    p, q = _shares(pre), _shares(post)
    total = p + q
    # p = m (1 + d) and q = m (1 - d): terms that are none below 0 and exactly 0 at p = q, where
    # p ln(p/m) and q ln(q/m) would cancel.
    d = torch.where(total > 0, (p - q) / total, total * 0)
    divergence = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    return (total / 4 * divergence).sum(-1).clamp(min=0)


def spectral_entropy_spread(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """The standard error that SE has of N independent Gaussian samples, times sqrt(N).

    To first order in the error of the covariance, an eigenvalue of N such samples has the variance
    `2 lambda^2 / N`, and none covaries with another: `sqrt(2 sum((lambda dSE/dlambda)^2))`, with
    `lambda dSE/dlambda = -p (ln p + SE)`. 0 where the metric is at its extreme. Source: ours.
    """
    p = _shares(eigenvalues)
    entropy = torch.special.entr(p)
    return _spread(entropy - p * entropy.sum(-1, keepdim=True))


def participation_ratio_spread(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """As `spectral_entropy_spread`, of PR: `lambda dPR/dlambda = 2 PR p (1 - PR p)`."""
    p = _shares(eigenvalues)
    ratio = p.square().sum(-1, keepdim=True).reciprocal()
    return _spread(2 * ratio * p * (1 - ratio * p))


def eigenvalue_early_enrichment_spread(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """As `spectral_entropy_spread`, of EEE: `lambda dEEE/dlambda = p (w - EEE)`, with
    `w = (dim + 1 - 2 rank) / dim`."""
    p = _shares(eigenvalues)
    weight = _early_weights(p)
    return _spread(p * (weight - (p * weight).sum(-1, keepdim=True)))


def _early_weights(p: Float64[Tensor, "*batch dim"]) -> Float64[Tensor, " dim"]:
    """What each share counts in EEE. The sum over k, taken per share: the i-th is in S_k for the
    dim - i + 1 values of k from i on."""
    dim = p.shape[-1]
    rank = torch.arange(1, dim + 1, dtype=p.dtype, device=p.device)
    return (dim + 1 - 2 * rank) / dim


def _spread(slopes: Float64[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    return (2 * slopes.square().sum(-1)).sqrt()


OF_ONE_SPECTRUM: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "se_{site}": lambda spectra, n_samples: spectral_entropy(spectra),
    "pr_{site}": lambda spectra, n_samples: participation_ratio(spectra),
    "eee_{site}": lambda spectra, n_samples: eigenvalue_early_enrichment(spectra),
    "variance_{site}": lambda spectra, n_samples: spectra.sum(-1),
    "pr_{site}_corrected": lambda spectra, n_samples: corrected_participation_ratio(
        participation_ratio(spectra), n_samples
    ),
}
"""What spectra `[*batch, dim]` of so many samples say, by the column of each site."""

OF_A_GROUP: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    **{column.replace("_{site}", ""): of_one for column, of_one in OF_ONE_SPECTRUM.items()},
    "se_spread": lambda spectrum, n_samples: spectral_entropy_spread(spectrum),
    "pr_spread": lambda spectrum, n_samples: participation_ratio_spread(spectrum),
    "eee_spread": lambda spectrum, n_samples: eigenvalue_early_enrichment_spread(spectrum),
}
"""What the spectrum of a site or a group of its samples says, by the column of `groups`."""

OF_TWO_SPECTRA: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"js": jensen_shannon}
"""What the spectra of pre and post say together, by column."""


def _shares(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch shares"]:
    """`lambda / sum(lambda)`, the largest first; NaN throughout where that is not defined, and one
    NaN for no eigenvalues."""
    values = eigenvalues.detach().double().sort(-1, descending=True).values
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    # By the largest first: neither the sum nor a later square can then over- or underflow.
    relative = values / values[..., :1]
    valid = values.isfinite() & (values >= 0)
    defined = valid.all(-1, keepdim=True) & (values[..., :1] > 0)
    return torch.where(defined, relative / relative.sum(-1, keepdim=True), torch.nan)


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
