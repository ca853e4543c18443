"""log PR as a term of a loss: its value, its gradient, and where the gradient must vanish."""

import math

import pytest
import torch
from torch import Tensor

from nerve.spectra.log_ratio import evenly, log_participation_ratio

ALL = 10**6


def features(*shape: int, dtype: torch.dtype = torch.float64, spread: float = 1.0) -> Tensor:
    """Normal samples whose directions have decreasing variances."""
    generator = torch.Generator().manual_seed(sum(shape))
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn * torch.arange(1, shape[-1] + 1) ** -spread + 3.0).to(dtype)


def from_eigenvalues(x: Tensor) -> Tensor:
    """From the definition, with autograd's own gradient."""
    rows = x.flatten(0, -2)
    centered = rows - rows.mean(0)
    values = torch.linalg.eigvalsh(centered.T @ centered / (len(rows) - 1))
    return 2 * values.sum().log() - values.square().sum().log()


@pytest.mark.parametrize("shape", [(40, 6), (5, 8, 6), (6, 40), (2, 3, 40)])
def test_value_and_gradient_agree_with_the_eigenvalues(shape: tuple[int, ...]) -> None:
    """With more samples than dimensions, and with fewer, where the other matrix is the smaller
    one."""
    x = features(*shape).requires_grad_()
    value, expected = log_participation_ratio(x, ALL), from_eigenvalues(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (gradient,), (reference,) = (torch.autograd.grad(of, x) for of in (value, expected))
    torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(9, 4), (3, 7), (2, 5, 3)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    x = features(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: log_participation_ratio(y, ALL), x)
    assert torch.autograd.gradcheck(lambda y: log_participation_ratio(y, 4) ** 2, x)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e25])
def test_the_scale_of_the_features_does_not_matter(scale: float) -> None:
    """In float32, where squares would underflow; the gradient is taken with respect to log x."""
    plain = features(30, 5, dtype=torch.float32).requires_grad_()
    scaled = (plain.detach() * scale).requires_grad_()
    values = [log_participation_ratio(x, ALL) for x in (plain, scaled)]
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(v, x)[0] for v, x in zip(values, (plain, scaled), strict=True)]
    torch.testing.assert_close(gradients[1] * scale, gradients[0], rtol=1e-2, atol=1e-5)


FLAT = torch.cat([torch.eye(6), -torch.eye(6)]).double()
ONE_DIRECTION = torch.arange(8.0).double()[:, None] * torch.tensor([1.0, -2.0, 0.5]).double()
DEGENERATE = torch.tensor([[1.0, 1, 1], [-1, -1, 1], [1, -1, 2], [-1, 1, 2]]).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (FLAT, math.log(6)),
        (ONE_DIRECTION, 0.0),
        (torch.full((7, 3), 2.5).double(), 0.0),
        (torch.zeros(7, 3).double(), 0.0),
        (features(1, 3), 0.0),
    ],
    ids=["flat", "one direction", "constant", "dead", "one sample"],
)
def test_the_gradient_is_0_at_both_extremes_and_without_variance(
    x: Tensor, expected: float, dtype: torch.dtype
) -> None:
    narrow = x.clone().to(dtype).requires_grad_()
    value = log_participation_ratio(narrow, ALL)
    coarse = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 2e-2)
    assert value.item() == pytest.approx(expected, abs=coarse)
    (gradient,) = torch.autograd.grad(value, narrow)
    assert gradient.dtype == dtype
    # In units of what the gradient is elsewhere: about 1 / (n · size).
    size = float(x.std(dim=0, correction=0).norm()) or 1.0
    assert gradient.abs().max() <= coarse / size
    if not x.std(dim=0, correction=0).any() or len(x) == 1:
        assert not gradient.any()


def test_a_degenerate_spectrum_has_the_gradient_of_its_sums() -> None:
    """Eigenvalues 4/3, 4/3 and 1/3: the eigenvectors of the pair are undefined, but the sums are
    not."""
    x = DEGENERATE.clone().requires_grad_()
    value = log_participation_ratio(x, ALL)
    assert value.item() == pytest.approx(math.log(9**2 / (4**2 + 4**2 + 1)))
    assert torch.autograd.gradcheck(lambda y: log_participation_ratio(y, ALL), x)


def test_a_constant_feature_has_gradient_0_and_no_nan() -> None:
    x = features(20, 4)
    x[:, 2] = 0.0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(log_participation_ratio(x, ALL), x)
    assert gradient.isfinite().all()
    assert gradient.any()
    assert not gradient[:, 2].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_feature_is_dead_even_if_its_mean_is_rounded(dtype: torch.dtype) -> None:
    """Like the features of a layer that outputs only its bias; also next to a feature that
    varies."""
    x = torch.tensor([0.1, -0.3, 1e4, 7e-5]).to(dtype).expand(1001, 4).clone().requires_grad_()
    value = log_participation_ratio(x, ALL)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == 0
    assert not gradient.any()
    varied = x.detach().clone()
    varied[:, 3] = 1e-5 * torch.randn(1001, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(log_participation_ratio(varied.requires_grad_(), ALL), varied)
    assert not gradient[:, :3].any()


def test_only_the_chosen_samples_have_a_gradient() -> None:
    x = features(4, 16, 3).requires_grad_()
    taken = evenly(64, 10)
    value = log_participation_ratio(x, 10)
    torch.testing.assert_close(value, from_eigenvalues(x.flatten(0, 1)[taken]))
    (gradient,) = torch.autograd.grad(value, x)
    moved = gradient.flatten(0, 1).any(dim=1).nonzero().flatten()
    assert moved.tolist() == sorted(taken.tolist())


@pytest.mark.parametrize("n", [1, 2, 6, 7, 64, 100, 3 * 2**8, 2**16])
def test_each_sample_is_chosen_at_most_once(n: int) -> None:
    assert sorted(evenly(n, ALL).tolist()) == list(range(n))
    assert len(set(evenly(n, n // 2).tolist())) == n // 2


def test_samples_are_spread_evenly_over_sequences_and_positions() -> None:
    """A quarter of 512 sequences of 128: equally many from each position, and about 32 from each
    sequence."""
    taken = evenly(2**16, 2**14)
    assert set(torch.bincount(taken % 128).tolist()) == {128}
    counts = torch.bincount(taken // 128, minlength=512)
    assert counts.min() >= 27
    assert counts.max() <= 37


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_features_have_nearly_the_gradient_of_float64(dtype: torch.dtype) -> None:
    x = features(256, 32).to(dtype)
    narrow, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = [log_participation_ratio(each, ALL) for each in (narrow, wide)]
    assert values[0].dtype == torch.float32
    assert values[0].item() == pytest.approx(values[1].item(), abs=5e-3)
    gradients = [
        torch.autograd.grad(value, each)[0].double()
        for value, each in zip(values, (narrow, wide), strict=True)
    ]
    assert torch.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.999


def test_the_operator_satisfies_the_requirements_of_compiled_code() -> None:
    for shape, n in (((4, 8, 5), 10), ((3, 7), 50)):
        x = features(*shape, dtype=torch.float32).requires_grad_()
        found = torch.library.opcheck(torch.ops.nerve.log_ratio.default, (x, n))
        assert set(found.values()) == {"SUCCESS"}
