"""The GPU kernels against float64."""

import pytest
import torch

from nerve.spectra.moments import moments_of, prepare_centered
from nerve.spectra.product import has_kernels

pytestmark = pytest.mark.cuda
SHAPES = [(5, 130), (1300, 200), (513, 64), (40_000, 384)]


@pytest.fixture(params=SHAPES)
def x(request):
    generator = torch.Generator("cuda").manual_seed(0)
    n, dim = request.param
    return torch.randn(n, 2 * dim, device="cuda", generator=generator).bfloat16()


def halves(x):
    """The first half of the columns as a view, the second as a copy, and every second column."""
    dim = x.shape[1] // 2
    return x[:, :dim], x[:, dim:].contiguous(), x[:, ::2]


def test_this_gpu_runs_the_kernels():
    assert has_kernels(torch.device("cuda"))
    assert not has_kernels(torch.device("cpu"))


@pytest.mark.parametrize("n_terms", [256, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_added_products_agree_with_float64(x, dtype, n_terms):
    """Relative to the lengths of the two columns; for one pair, and for several pairs of two
    matrices."""
    from nerve.spectra.kernels import add_lower_products

    for a in halves(x.to(dtype)):
        b = a.flip(0)
        for pairs in ([(a, a)], [(a, a), (a, b), (b, a)]):
            total = torch.eye(a.shape[1], dtype=torch.float64, device="cuda")
            expected = total + sum(one.double().T @ other.double() for one, other in pairs)
            add_lower_products(total, pairs, n_terms)
            length = a.double().norm(dim=0)
            bound = 2e-6 * len(pairs) * length * length[:, None] + 1e-12
            assert ((total - expected).tril().abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_square_distances_agree_with_float64(x, dtype):
    from nerve.spectra.kernels import square_distances

    for part in halves(x.to(dtype)):
        center = 3 + torch.arange(part.shape[1], device="cuda", dtype=torch.float64) / 100
        expected = (part.double() - center.float().double()).square().sum(1)
        torch.testing.assert_close(square_distances(part, center), expected, rtol=1e-6, atol=0)


def test_values_that_are_not_finite_appear_in_the_results(x):
    from nerve.spectra.kernels import add_lower_products, square_distances

    part = x[:, : x.shape[1] // 2].clone()
    part[3, 7] = torch.nan
    products = torch.zeros(part.shape[1], part.shape[1], dtype=torch.float64, device="cuda")
    add_lower_products(products, [(part, part)], 512)
    products = products.tril()
    assert products[7].isnan().any()
    assert not products[:7, :7].isnan().any()
    assert square_distances(part, part.new_zeros(part.shape[1], dtype=torch.float32))[3].isnan()


@pytest.mark.parametrize("n", [16_384, 16_383, 1_000])
def test_prepared_kernels_are_not_compiled_again(monkeypatch, n):
    """For any number of samples; the number of features is a multiple of 16."""
    from nerve.spectra import kernels

    device = torch.device("cuda")
    prepare_centered(device)

    def compile(*args: object, **options: object) -> None:
        raise AssertionError("compiled in the middle of training")

    for kernel in (kernels._lower_tiles, kernels._add_lower):
        monkeypatch.setattr(kernel, "compile", compile)
    x = torch.randn(n, 512, device=device).bfloat16() + 3
    moments, name = moments_of(x, "bfloat16")
    assert name == "float16x2"
    assert moments.scatter.isfinite().all()


def test_another_number_of_samples_does_not_recompile_kernels(monkeypatch):
    from nerve.spectra import kernels

    x = torch.randn(4_096, 512, device="cuda").bfloat16()
    center = torch.zeros(512, device="cuda")

    def use(n):
        total = torch.zeros(512, 512, dtype=torch.float64, device="cuda")
        kernels.add_lower_products(total, [(x[:n], x[:n])], 512)
        return kernels.square_distances(x[:n], center)

    use(4_096)

    def compile(*args: object, **options: object) -> None:
        raise AssertionError("compiled anew for another number of samples")

    for kernel in (kernels._lower_tiles, kernels._add_lower, kernels._square_distances):
        monkeypatch.setattr(kernel, "compile", compile)
    for n in (1, 2, 77, 1_000, 4_095):
        assert use(n).isfinite().all()
