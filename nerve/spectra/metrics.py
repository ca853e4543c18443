"""Metrics of an eigenvalue spectrum: how many directions the features use, and how evenly.

All take unnormalized eigenvalues, `[*batch, dim]`, in any order and any units, and compute the
shares `p = lambda / sum(lambda)` in float64. No constant is added anywhere, so the results do not
depend on the scale of the features. If the shares of a spectrum are undefined (zero variance, an
eigenvalue that is negative or not finite, no eigenvalues), its metrics are NaN.

Source: NerVE (Jha & Reagen, ICLR 2026, arXiv 2603.06922).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def spectral_entropy(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """Spectral entropy `SE = -sum(p ln p)`, with `0 ln 0 = 0`, in nats.

    In [0, ln dim]: 0 if one direction has all of the variance, ln dim for a flat spectrum.
    `exp(SE)` is an effective number of directions, in which small eigenvalues count for more than
    in the participation ratio. Source: NerVE's SE.
    """
    return torch.special.entr(_shares(eigenvalues)).sum(-1)


def participation_ratio(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """Participation ratio `PR = sum(lambda)^2 / sum(lambda^2) = 1 / sum(p^2)`, in directions.

    In [1, dim]: 1 if one direction has all of the variance, dim for a flat spectrum. Source:
    NerVE's PR.
    """
    return _shares(eigenvalues).square().sum(-1).reciprocal()


def corrected_participation_ratio(
    participation_ratio: Float[Tensor, "*batch"], n_samples: int
) -> Float64[Tensor, "*batch"]:
    """The participation ratio without the bias of a finite sample, `1 / (1/PR - 1/N)`.

    The covariance of N independent samples gives `1/PR_measured ~ 1/PR + 1/N`. The tokens of a
    sequence are not independent, so for them the correction is too small. NaN if it cannot be
    trusted: with fewer than two samples per direction, `N < 2 PR`, which includes every case in
    which `1/PR - 1/N` is not positive. In [1, N]. Source: ours.
    """
    measured = participation_ratio.double()
    corrected = measured / (1 - measured / max(n_samples, 1))
    return torch.where(n_samples >= 2 * measured, corrected, torch.nan)


def eigenvalue_early_enrichment(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """Eigenvalue early enrichment `EEE = (2/dim) sum_k (S_k - k/dim)`, `S_k` the k largest shares.

    How far the cumulative spectrum lies above that of a flat spectrum. This is exactly the Gini
    coefficient of the eigenvalues. In [0, 1 - 1/dim]: 0 for a flat spectrum, 1 - 1/dim if one
    direction has all of the variance. Source: NerVE's EEE.
    """
    p = _shares(eigenvalues)
    return (p * _early_weights(p)).sum(-1).clamp(min=0)


def jensen_shannon(
    pre: Float[Tensor, "*batch dim"], post: Float[Tensor, "*batch dim"]
) -> Float64[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two spectra, in nats; compares shares of equal rank.

    `JS = KL(p || m) / 2 + KL(q || m) / 2` with `m = (p + q) / 2`, where p and q are the sorted
    shares of `pre` and `post`. Symmetric. In [0, ln 2): 0 if the shares are equal; ln 2 is never
    reached, because both spectra have their largest share first. For one direction and a flat
    spectrum, it is `[ln(2D/(D+1)) + ln(2/(D+1))/D + (1 - 1/D) ln 2] / 2` with D = dim. Source:
    NerVE's JS.
    """
    p, q = _shares(pre), _shares(post)
    total = p + q
    # p = m (1 + d) and q = m (1 - d). The sum of these terms is never negative, and exactly 0 if
    # p = q, where p ln(p/m) and q ln(q/m) would cancel.
    d = torch.where(total > 0, (p - q) / total, total * 0)
    divergence = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    return (total / 4 * divergence).sum(-1).clamp(min=0)


def spectral_entropy_spread(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    """The standard error of SE for N independent Gaussian samples, times sqrt(N).

    To first order in the error of the covariance, each eigenvalue of N such samples has the
    variance `2 lambda^2 / N`, and different eigenvalues are uncorrelated. So the result is
    `sqrt(2 sum((lambda dSE/dlambda)^2))` with `lambda dSE/dlambda = -p (ln p + SE)`. It is 0 where
    SE is at an extreme. Source: ours.
    """
    p = _shares(eigenvalues)
    entropy = torch.special.entr(p)
    return _spread(entropy - p * entropy.sum(-1, keepdim=True))


def participation_ratio_spread(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """As `spectral_entropy_spread`, for PR: `lambda dPR/dlambda = 2 PR p (1 - PR p)`."""
    p = _shares(eigenvalues)
    ratio = p.square().sum(-1, keepdim=True).reciprocal()
    return _spread(2 * ratio * p * (1 - ratio * p))


def eigenvalue_early_enrichment_spread(
    eigenvalues: Float[Tensor, "*batch dim"],
) -> Float64[Tensor, "*batch"]:
    """As `spectral_entropy_spread`, for EEE: `lambda dEEE/dlambda = p (w - EEE)`, where
    `w = (dim + 1 - 2 rank) / dim`."""
    p = _shares(eigenvalues)
    weight = _early_weights(p)
    return _spread(p * (weight - (p * weight).sum(-1, keepdim=True)))


def _early_weights(p: Float64[Tensor, "*batch dim"]) -> Float64[Tensor, " dim"]:
    """The weight of each share in EEE: the i-th largest share is part of S_k for the
    `dim - i + 1` values of k from i to dim."""
    dim = p.shape[-1]
    rank = torch.arange(1, dim + 1, dtype=p.dtype, device=p.device)
    return (dim + 1 - 2 * rank) / dim


def _spread(slopes: Float64[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch"]:
    return (2 * slopes.square().sum(-1)).sqrt()


def _shares(eigenvalues: Float[Tensor, "*batch dim"]) -> Float64[Tensor, "*batch shares"]:
    """`lambda / sum(lambda)`, in descending order; all NaN if that is undefined, and a single NaN
    if there are no eigenvalues."""
    values = eigenvalues.detach().double().sort(-1, descending=True).values
    if values.shape[-1] == 0:
        return values.new_full((*values.shape[:-1], 1), torch.nan)
    # Dividing by the largest first keeps the sum and later squares from over- and underflowing.
    relative = values / values[..., :1]
    valid = values.isfinite() & (values >= 0)
    defined = valid.all(-1, keepdim=True) & (values[..., :1] > 0)
    return torch.where(defined, relative / relative.sum(-1, keepdim=True), torch.nan)


OF_ONE_SPECTRUM: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "se_{site}": lambda spectra, n_samples: spectral_entropy(spectra),
    "pr_{site}": lambda spectra, n_samples: participation_ratio(spectra),
    "eee_{site}": lambda spectra, n_samples: eigenvalue_early_enrichment(spectra),
    "variance_{site}": lambda spectra, n_samples: spectra.sum(-1),
    "pr_{site}_corrected": lambda spectra, n_samples: corrected_participation_ratio(
        participation_ratio(spectra), n_samples
    ),
}
"""The metrics of spectra `[*batch, dim]` of a number of samples, by the column of each site."""

OF_A_GROUP: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    **{column.replace("_{site}", ""): of_one for column, of_one in OF_ONE_SPECTRUM.items()},
    "se_spread": lambda spectrum, n_samples: spectral_entropy_spread(spectrum),
    "pr_spread": lambda spectrum, n_samples: participation_ratio_spread(spectrum),
    "eee_spread": lambda spectrum, n_samples: eigenvalue_early_enrichment_spread(spectrum),
}
"""The metrics of the spectrum of a site, or of a group of its samples, by the column of
`groups`."""

OF_TWO_SPECTRA: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"js": jensen_shannon}
"""The metrics of a pair of spectra, of pre and post, by column."""
