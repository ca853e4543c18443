"""The kernels for GPUs against float64."""

import pytest
import torch

from nerve.spectra.product import has_kernels

pytestmark = pytest.mark.cuda
SHAPES = [(5, 130), (1300, 200), (513, 64), (40_000, 384)]


@pytest.fixture(params=SHAPES)
def x(request):
    generator = torch.Generator("cuda").manual_seed(0)
    n, dim = request.param
    return torch.randn(n, 2 * dim, device="cuda", generator=generator).bfloat16()


def halves(x):
    """One half of a fused projection, the other by itself, and every second column."""
    dim = x.shape[1] // 2
    return x[:, :dim], x[:, dim:].contiguous(), x[:, ::2]


def test_this_gpu_runs_them():
    assert has_kernels(torch.device("cuda"))
    assert not has_kernels(torch.device("cpu"))


def test_lower_products_are_those_of_float64(x):
    """Relative to the sum of the squares of two columns."""
    from nerve.spectra.kernels import lower_products

    for part in halves(x):
        products = lower_products(part).sum(0, dtype=torch.float64).tril()
        expected = (part.double().T @ part.double()).tril()
        length = part.double().norm(dim=0)
        assert ((products - expected).abs() <= 2e-6 * length * length[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_square_distances_are_those_of_float64(x, dtype):
    from nerve.spectra.kernels import square_distances

    for part in halves(x.to(dtype)):
        center = 3 + torch.arange(part.shape[1], device="cuda") / 100
        expected = (part.double() - center.double()).square().sum(1)
        torch.testing.assert_close(square_distances(part, center), expected, rtol=1e-6, atol=0)


def test_what_is_not_finite_shows(x):
    from nerve.spectra.kernels import lower_products, square_distances

    part = x[:, : x.shape[1] // 2].clone()
    part[3, 7] = torch.nan
    products = lower_products(part).sum(0).tril()
    assert products[7].isnan().any()
    assert not products[:7, :7].isnan().any()
    assert square_distances(part, part.new_zeros(part.shape[1], dtype=torch.float32))[3].isnan()
