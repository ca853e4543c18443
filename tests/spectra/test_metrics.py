"""Metrics against closed forms and independent float64 oracles, and the cases that must be NaN."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from nerve.spectra import (
    StreamingCovariance,
    corrected_participation_ratio,
    eigenvalue_early_enrichment,
    eigenvalues,
    jensen_shannon,
    participation_ratio,
    spectral_entropy,
)

METRICS = (spectral_entropy, participation_ratio, eigenvalue_early_enrichment)


def flat(dim: int) -> Tensor:
    return torch.ones(dim, dtype=torch.float64)


def one_direction(dim: int) -> Tensor:
    return torch.eye(dim, dtype=torch.float64)[0]


def power_law(dim: int, exponent: float) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -exponent


def features(kind: str, n: int = 3000, dim: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spectrum = {
        "random": torch.ones(dim).double(),
        "power law": power_law(dim, 2.0),
        "rank-deficient": torch.cat([torch.ones(9), torch.zeros(dim - 9)]).double(),
        "condition 1e10": torch.logspace(0, -10, dim, dtype=torch.float64),
    }[kind]
    normal = torch.randn(n + dim, dim, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(normal[n:])
    return (normal[:n] * spectrum.sqrt()) @ rotation + 3


def numpy_metrics(x: Tensor) -> tuple[float, float, float]:
    """SE from the singular values, PR from the covariance without any eigenvalue, and EEE as the
    mean absolute difference of all pairs (Gini)."""
    centered = x.double().numpy() - x.double().numpy().mean(0)
    values = np.linalg.svd(centered, compute_uv=False) ** 2
    p = values[values > 0] / values.sum()
    covariance = np.cov(centered, rowvar=False)
    ratio = np.trace(covariance) ** 2 / (covariance**2).sum()
    gini = np.abs(values[:, None] - values).mean() / (2 * values.mean())
    return -(p * np.log(p)).sum(), ratio, gini


@pytest.mark.parametrize("dim", [1, 2, 7, 3072])
def test_a_flat_spectrum(dim):
    assert spectral_entropy(flat(dim)).item() == pytest.approx(math.log(dim), rel=1e-13)
    assert participation_ratio(flat(dim)).item() == pytest.approx(dim, rel=1e-13)
    assert eigenvalue_early_enrichment(flat(dim)).item() == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("dim", [1, 2, 7, 3072])
def test_one_direction(dim):
    assert spectral_entropy(one_direction(dim)) == 0
    assert participation_ratio(one_direction(dim)) == 1
    enrichment = eigenvalue_early_enrichment(one_direction(dim)).item()
    assert enrichment == pytest.approx(1 - 1 / dim, rel=1e-14)


@pytest.mark.parametrize(("n_high", "n_low", "ratio"), [(1, 3, 5.0), (10, 90, 100.0)])
def test_two_levels(n_high, n_low, ratio):
    """n_high eigenvalues that are `ratio` times as large as the other n_low; expected values by
    hand."""
    spectrum = torch.cat([ratio * flat(n_high), flat(n_low)]) * 0.3
    total, dim = ratio * n_high + n_low, n_high + n_low
    share = n_high * ratio / total  # of the high level together
    entropy = -share * math.log(ratio / total) - (1 - share) * math.log(1 / total)
    squares = n_high * ratio**2 + n_low
    assert spectral_entropy(spectrum).item() == pytest.approx(entropy, rel=1e-13)
    assert participation_ratio(spectrum).item() == pytest.approx(total**2 / squares, rel=1e-13)
    # The Lorenz curve has one corner: the Gini coefficient is how far it lies off the diagonal.
    enrichment = eigenvalue_early_enrichment(spectrum).item()
    assert enrichment == pytest.approx(share - n_high / dim, rel=1e-12)


@pytest.mark.parametrize(("dim", "value"), [(2, 0.2158), (3072, 0.6917)])
def test_jensen_shannon_of_one_direction_against_flat(dim, value):
    closed = (
        math.log(2 * dim / (dim + 1)) + math.log(2 / (dim + 1)) / dim + (1 - 1 / dim) * math.log(2)
    ) / 2
    measured = jensen_shannon(one_direction(dim), flat(dim)).item()
    assert measured == pytest.approx(closed, rel=1e-12)
    assert round(measured, 4) == value


def test_jensen_shannon_is_zero_for_equal_shapes_and_symmetric():
    p, q = power_law(50, 1.0), power_law(50, 2.5)
    assert jensen_shannon(p, 8 * p) == 0
    assert jensen_shannon(p, q) == jensen_shannon(q, p)
    assert 0 < jensen_shannon(p, q) < math.log(2)


def test_jensen_shannon_of_nearly_equal_spectra_keeps_its_digits():
    """Shares 1/2 +- e against 1/2 give e^2 + O(e^4) = 1e-12, where sums of p ln p keep only 4
    digits."""
    e = 1e-6
    near = torch.tensor([0.5 + e, 0.5 - e], dtype=torch.float64)
    assert jensen_shannon(near, flat(2)).item() == pytest.approx(e**2 / 2, rel=1e-6)


@pytest.mark.parametrize("exponents", [(0.0, 1.0), (0.5, 3.0), (1.0, 1.1)])
def test_jensen_shannon_agrees_with_scipy(exponents):
    p, q = (power_law(200, exponent) for exponent in exponents)
    expected = jensenshannon(p.numpy(), q.numpy()) ** 2
    assert jensen_shannon(p, q).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["random", "power law", "rank-deficient", "condition 1e10"])
def test_metrics_of_features_agree_with_numpy(kind, dtype):
    """From features to metrics, to 1e-6, against float64 formulas that share no step with the
    code."""
    x = features(kind).to(dtype)
    streaming = StreamingCovariance(x.shape[1])
    for part in x.split(700):
        streaming.update(part)
    spectrum = eigenvalues(streaming.covariance())
    measured = [metric(spectrum).item() for metric in METRICS]
    assert measured == pytest.approx(numpy_metrics(x), rel=1e-6)


def test_the_cumulative_sum_gives_the_same_enrichment():
    """The definition in the paper, k by k."""
    p = power_law(30, 1.5).numpy() / power_law(30, 1.5).numpy().sum()
    cumulative = sum(p[: k + 1].sum() - (k + 1) / 30 for k in range(30))
    enrichment = eigenvalue_early_enrichment(power_law(30, 1.5)).item()
    assert enrichment == pytest.approx(2 / 30 * cumulative, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-12, 1e12, 1e150, 1e308])
def test_metrics_do_not_depend_on_the_units(scale):
    spectrum = power_law(64, 1.0)
    for metric in METRICS:
        assert metric(spectrum * scale).item() == pytest.approx(metric(spectrum).item(), rel=1e-13)
    assert jensen_shannon(spectrum * scale, flat(64)).item() == pytest.approx(
        jensen_shannon(spectrum, flat(64)).item(), rel=1e-12
    )


def test_an_additive_constant_fails_the_same_test():
    spectrum = power_law(64, 1.0) * 1e-12
    p = spectrum / (spectrum.sum() + 1e-12)
    assert (1 / p.square().sum()).item() != pytest.approx(
        participation_ratio(spectrum).item(), rel=0.1
    )


def test_the_order_of_the_eigenvalues_does_not_matter():
    spectrum = power_law(64, 1.0)
    for metric in METRICS:
        assert metric(spectrum.flip(0)) == metric(spectrum)
    assert jensen_shannon(spectrum.flip(0), spectrum) == 0


def test_metrics_stay_in_their_ranges():
    generator = torch.Generator().manual_seed(0)
    dim = 16
    spectra = torch.rand(200, dim, dtype=torch.float64, generator=generator) ** 20
    entropy, ratio, enrichment = (metric(spectra) for metric in METRICS)
    assert ((entropy >= 0) & (entropy <= math.log(dim))).all()
    assert ((ratio >= 1) & (ratio <= dim)).all()
    assert ((enrichment >= 0) & (enrichment <= 1 - 1 / dim)).all()
    divergence = jensen_shannon(spectra[:100], spectra[100:])
    assert ((divergence >= 0) & (divergence < math.log(2))).all()


@pytest.mark.parametrize(
    "spectrum",
    [
        torch.zeros(5),
        torch.zeros(0),
        torch.tensor([1.0, torch.nan, 1.0]),
        torch.tensor([1.0, torch.inf, 1.0]),
        torch.tensor([1.0, -1.0, 1.0]),
    ],
    ids=["zero variance", "empty", "nan", "inf", "negative"],
)
def test_spectra_without_defined_shares_give_nan(spectrum):
    for metric in METRICS:
        assert metric(spectrum).isnan()
    if len(spectrum):
        assert jensen_shannon(spectrum, torch.ones(len(spectrum))).isnan()
        assert jensen_shannon(torch.ones(len(spectrum)), spectrum).isnan()


def test_each_item_of_a_batch_is_computed_separately():
    batch = torch.stack([power_law(8, 1.0), flat(8), torch.zeros(8).double()]).reshape(3, 1, 8)
    for metric in METRICS:
        measured = metric(batch)
        assert measured.shape == (3, 1)
        assert measured.dtype == torch.float64
        assert measured[0, 0] == metric(batch[0, 0])
        assert measured.isnan().flatten().tolist() == [False, False, True]
    assert jensen_shannon(batch, batch).isnan().flatten().tolist() == [False, False, True]


def test_the_corrected_ratio_removes_the_bias_of_independent_samples():
    """1/PR increases by about 1/N in a sample; the corrected value is within 1% of the true one."""
    x = torch.randn(400, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = participation_ratio(eigenvalues(torch.cov(x.T)))
    assert measured.item() == pytest.approx(80, rel=0.02)
    assert corrected_participation_ratio(measured, 400).item() == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("ratio", "n_samples", "expected"),
    [
        (50.0, 200, 200 / 3),
        (50.0, 100, 100.0),
        (50.0, 99, math.nan),
        (50.0, 50, math.nan),
        (50.0, 20, math.nan),
        (1.0, 0, math.nan),
        (math.nan, 100, math.nan),
    ],
)
def test_the_corrected_ratio_is_nan_below_two_samples_per_direction(ratio, n_samples, expected):
    measured = corrected_participation_ratio(torch.tensor(ratio).double(), n_samples).item()
    assert measured == pytest.approx(expected, rel=1e-14, nan_ok=True)
