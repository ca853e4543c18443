"""Eigenvalues against NumPy, the two shortcuts against the direct computation, and invalid
input."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra import eigenvalues, projected_eigenvalues
from nerve.spectra.eigenvalues import gram

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def with_spectrum(spectrum: Tensor, *, seed: int = 0) -> Tensor:
    rotation, _ = torch.linalg.qr(normal(len(spectrum), len(spectrum), seed=seed))
    matrix = (rotation * spectrum) @ rotation.T
    return (matrix + matrix.T) / 2


def relative_to_largest(measured: Tensor, expected: Tensor) -> float:
    return ((measured.cpu() - expected.cpu()).abs().max() / expected.max()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_a_known_spectrum_is_returned_sorted_in_float64(device):
    spectrum = torch.tensor([3.0, 0.5, 7.0, 0.0, 1e-9], dtype=torch.float64)
    measured = eigenvalues(with_spectrum(spectrum).to(device))
    assert measured.dtype == torch.float64
    torch.testing.assert_close(
        measured.cpu(), spectrum.sort(descending=True).values, rtol=0, atol=1e-14
    )
    assert (measured >= 0).all()


def test_each_matrix_of_a_batch_agrees_with_numpy():
    x = normal(2, 3, 40, 8)
    covariances = x.mT @ x
    measured = eigenvalues(covariances)
    assert measured.shape == (2, 3, 8)
    expected = np.linalg.eigvalsh(covariances.numpy())[..., ::-1]
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e-8, 1.0, 1e8, 1e150])
def test_the_scale_of_the_covariance_does_not_matter(scale):
    covariance = with_spectrum(torch.logspace(0, -6, 12, dtype=torch.float64))
    measured = eigenvalues(covariance * scale) / scale
    assert relative_to_largest(measured, eigenvalues(covariance)) <= 1e-14


def test_negative_rounding_becomes_zero():
    measured = eigenvalues(with_spectrum(torch.tensor([1.0, 1.0, -1e-6]).double()))
    assert measured[-1] == 0


def test_a_materially_negative_eigenvalue_raises_an_error_that_names_it():
    with pytest.raises(MeasurementError, match=r"got -0\.01, -0\.00503 of the trace"):
        eigenvalues(torch.diag(torch.tensor([1.0, 1.0, -0.01], dtype=torch.float64)))


def test_a_negative_matrix_in_a_batch_raises():
    with pytest.raises(MeasurementError, match="got -1,"):
        eigenvalues(torch.stack([torch.eye(3), -torch.eye(3)]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_only_the_matrix_that_is_not_finite_gives_nan(value):
    batch = torch.eye(3).repeat(2, 1, 1)
    batch[0, 1, 1] = value
    measured = eigenvalues(batch)
    assert measured[0].isnan().all()
    assert torch.equal(measured[1], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300, -7.0])
def test_only_the_lower_triangle_is_read(device, value):
    spectrum = torch.logspace(0, -6, 12, dtype=torch.float64)
    clean = with_spectrum(spectrum)
    above = torch.ones(12, 12, dtype=torch.bool).triu(1)
    measured = eigenvalues(clean.masked_fill(above, value).to(device))
    assert relative_to_largest(measured, spectrum) <= 1e-14


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (11, 0), (7, 6), (11, 11)])
def test_an_entry_of_the_lower_triangle_that_is_not_finite_gives_nan(device, value, place):
    covariance = with_spectrum(torch.ones(12).double())
    covariance[place] = value
    assert eigenvalues(covariance.to(device)).isnan().all()


def test_zeros_are_appended_up_to_the_requested_width():
    batch = torch.stack([torch.eye(3), torch.eye(3) * torch.nan])
    measured = eigenvalues(batch, 5)
    assert measured[0].tolist() == [1, 1, 1, 0, 0]
    assert measured[1].isnan().all()


def test_zero_variance_has_only_zero_eigenvalues():
    assert eigenvalues(torch.zeros(4, 4)).count_nonzero() == 0


def test_no_graph_is_kept_and_the_input_is_unchanged():
    covariance = torch.eye(3, requires_grad=True)
    assert not eigenvalues(covariance).requires_grad
    assert torch.equal(covariance.detach(), torch.eye(3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [2, 10, 32])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_the_gram_matrix_has_the_spectrum_of_the_covariance(device, n, mean):
    x = normal(n, 32) + mean
    measured = eigenvalues(gram(x.to(device)) / (n - 1), 32)
    assert measured.shape == (32,)
    assert relative_to_largest(measured, eigenvalues(torch.cov(x.T))) <= 1e-12
    assert measured[n:].count_nonzero() == 0


def test_the_gram_matrix_of_features_that_are_not_finite_gives_nan():
    broken = normal(4, 8)
    broken[1, 2] = torch.nan
    assert eigenvalues(gram(broken), 8).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "spectrum",
    [
        torch.ones(24).double(),
        torch.logspace(0, -10, 24).double(),
        torch.cat([torch.arange(1, 17), torch.zeros(8)]).double(),
    ],
    ids=["flat", "condition 1e10", "rank 16 of 24"],
)
@pytest.mark.parametrize("d_ff", [12, 24, 96])
def test_projecting_the_input_covariance_equals_the_direct_computation(device, spectrum, d_ff):
    """To 2e-10 of the largest eigenvalue, for wide, square and narrow layers."""
    weight, covariance = normal(d_ff, 24, seed=5), with_spectrum(spectrum)
    measured = projected_eigenvalues(weight.to(device), covariance.to(device))
    direct = weight @ covariance @ weight.T
    expected = np.linalg.eigvalsh(((direct + direct.T) / 2).numpy())[::-1].copy()
    assert measured.shape == (d_ff,)
    assert relative_to_largest(measured, torch.from_numpy(expected)) <= 2e-10


@pytest.mark.parametrize("d_ff", [6, 24, 96])
def test_projection_reads_only_the_lower_triangle_of_the_input_covariance(d_ff):
    weight, covariance = (
        normal(d_ff, 24, seed=5),
        with_spectrum(torch.logspace(0, -10, 24).double()),
    )
    broken = covariance.masked_fill(torch.ones(24, 24).triu(1) > 0, torch.nan)
    expected = projected_eigenvalues(weight, covariance)
    assert torch.equal(projected_eigenvalues(weight, broken), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 11])
def test_projection_by_a_rank_deficient_weight(rank):
    """Including collapsed and dead layers: for W = 0, the factor is zero."""
    weight = normal(64, rank, seed=5) @ normal(rank, 24, seed=6)
    covariance = with_spectrum(torch.logspace(0, -10, 24).double())
    measured = projected_eigenvalues(weight, covariance)
    expected = torch.linalg.eigvalsh(weight @ covariance @ weight.T).flip(0)
    torch.testing.assert_close(measured, expected, rtol=0, atol=2e-10 * float(expected.amax()))


def test_projected_eigenvalues_are_those_of_the_features_with_any_bias():
    x, weight, bias = normal(500, 16), normal(64, 16, seed=1), normal(64, seed=2) * 100
    features = x @ weight.T + bias
    measured = projected_eigenvalues(weight, torch.cov(x.T))
    assert relative_to_largest(measured, eigenvalues(torch.cov(features.T))) <= 2e-10
    assert measured[16:].count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("d_ff", [2, 8])
def test_projection_of_values_that_are_not_finite_gives_nan(device, value, d_ff):
    weight, covariance = normal(d_ff, 4).to(device), torch.eye(4).double().to(device)
    for row in range(d_ff):
        for column in range(4):
            broken = weight.clone()
            broken[row, column] = value
            assert projected_eigenvalues(broken, covariance).isnan().all()
    for place in zip(*torch.tril_indices(4, 4).tolist(), strict=True):
        broken = covariance.clone()
        broken[place] = value
        assert projected_eigenvalues(weight, broken).isnan().all()


def test_equal_samples_have_exactly_no_variance_in_the_gram_matrix():
    """In float64, the mean of seven times 0.1 is not 0.1."""
    same = torch.full((7, 8), 0.1, dtype=torch.float64)
    assert (same - same.mean(0)).count_nonzero() > 0
    assert gram(same).tril().count_nonzero() == 0


@pytest.mark.parametrize("d_ff", [4, 8])
def test_projection_raises_for_a_matrix_that_is_no_covariance(d_ff):
    covariance = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.1]))
    with pytest.raises(MeasurementError, match="cannot be negative"):
        projected_eigenvalues(torch.eye(d_ff, 4), covariance)
