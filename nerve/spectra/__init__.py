"""From features to spectral metrics: covariance, eigenvalues, metrics. Tensors in, tensors out."""

from nerve.spectra.covariance import StreamingCovariance
from nerve.spectra.eigenvalues import eigenvalues, projected_eigenvalues
from nerve.spectra.metrics import (
    corrected_participation_ratio,
    eigenvalue_early_enrichment,
    jensen_shannon,
    participation_ratio,
    spectral_entropy,
)
from nerve.spectra.outside import variance_outside
from nerve.spectra.shares import SampleShares, Shares

__all__ = [
    "SampleShares",
    "Shares",
    "StreamingCovariance",
    "corrected_participation_ratio",
    "eigenvalue_early_enrichment",
    "eigenvalues",
    "jensen_shannon",
    "participation_ratio",
    "projected_eigenvalues",
    "spectral_entropy",
    "variance_outside",
]
