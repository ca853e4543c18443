"""The variance outside the span of a weight: closed forms, NumPy's projector, any rank."""

import numpy as np
import pytest
import torch
from torch import Tensor

from nerve.spectra import StreamingCovariance, variance_outside
from nerve.spectra.outside import column_basis

DIM, D_IN, N = 24, 5, 400


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def scatter_of(x: Tensor) -> Tensor:
    covariance = StreamingCovariance(x.shape[-1])
    covariance.update(x)
    return covariance.scatter()


def oracle(weight: Tensor, x: Tensor) -> float:
    """From the projector by NumPy's pseudo-inverse."""
    w, centered = weight.double().numpy(), (x - x.mean(0)).double().numpy()
    inside = centered @ (w @ np.linalg.pinv(w, rcond=1e-6))
    return 1 - np.square(inside).sum() / np.square(centered).sum()


def test_the_output_of_the_weight_itself_lies_inside():
    weight = draw(DIM, D_IN)
    pre = draw(N, D_IN, seed=1) @ weight.T + draw(DIM, seed=2)
    assert float(variance_outside(weight, scatter=scatter_of(pre))) <= 1e-14


def test_isotropic_variance_lies_outside_in_proportion_to_the_directions():
    weight = draw(DIM, D_IN)
    isotropic = torch.eye(DIM, dtype=torch.float64)
    assert float(variance_outside(weight, scatter=isotropic)) == pytest.approx(1 - D_IN / DIM)


def test_directions_that_the_weight_cannot_reach_lie_outside():
    weight, _ = torch.linalg.qr(draw(DIM, DIM))
    x = draw(N, 4) @ weight[:, :4].T
    assert float(variance_outside(weight[:, 4:9], scatter=scatter_of(x))) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [10, N])
def test_the_share_agrees_with_numpys_projector(dtype, n):
    weight, x = draw(DIM, D_IN).to(dtype), draw(n, DIM, seed=1).exp()
    expected = oracle(weight, x)
    assert float(variance_outside(weight, scatter=scatter_of(x))) == pytest.approx(expected)
    assert float(variance_outside(weight, samples=x)) == pytest.approx(expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: torch.cat([0 * w[:, :1], w[:, 1:]], 1),
        lambda w: torch.cat([w, w[:, :2]], 1),
        lambda w: w[:, :2] @ draw(2, D_IN, seed=3),
        lambda w: w[:, :2].float() @ draw(2, D_IN, seed=3).float(),
        lambda w: 0 * w,
    ],
    ids=["dead column", "doubled columns", "low rank", "low rank in float32", "dead weight"],
)
def test_linearly_dependent_columns_do_not_count(change):
    weight, x = change(draw(DIM, D_IN)), draw(N, DIM, seed=1)
    assert column_basis(weight).shape[1] == torch.linalg.matrix_rank(weight)
    assert float(variance_outside(weight, samples=x)) == pytest.approx(oracle(weight, x))


def test_the_length_of_a_column_does_not_matter():
    """Also if another column is dead, so that the columns are examined more closely."""
    weight, x = draw(DIM, D_IN), draw(N, DIM, seed=1)
    expected = float(variance_outside(weight, samples=x))
    lengths = torch.tensor([1, 1e-20, 1e3, 1e-9, 1], dtype=torch.float64)
    assert float(variance_outside(weight * lengths, samples=x)) == pytest.approx(expected)
    dead = torch.cat([weight * lengths, 0 * weight[:, :1]], 1)
    assert float(variance_outside(dead, samples=x)) == pytest.approx(expected)


def test_scale_and_mean_do_not_matter():
    weight, x = draw(DIM, D_IN), draw(N, DIM, seed=1)
    expected = pytest.approx(float(variance_outside(weight, samples=x)))
    assert float(variance_outside(weight * 1e-9, samples=x * 1e12 + 1e13)) == expected


def test_no_variance_and_entries_that_are_not_finite_give_nan():
    weight, x = draw(DIM, D_IN), draw(N, DIM, seed=1)
    for value in (1.0, 0.1, 0.7):  # the means of some are rounded
        assert variance_outside(weight, samples=torch.full((10, DIM), value)).isnan()
        constant = torch.full((10, DIM), value, dtype=torch.float64)
        assert variance_outside(weight, samples=constant).isnan()
    assert variance_outside(weight * torch.inf, samples=x).isnan()
    assert variance_outside(weight, samples=x * torch.nan).isnan()
