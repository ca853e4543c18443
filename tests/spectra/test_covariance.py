"""The streaming covariance against float64 NumPy, for every mean, scale, dtype and order."""

from dataclasses import replace
from itertools import permutations

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.spectra import (
    StreamingCovariance,
    eigenvalues,
    participation_ratio,
    spectral_entropy,
)
from nerve.spectra.product import PRODUCTS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DIM = 24


def draw(n: int = 1500, dim: int = DIM, *, seed: int = 0) -> Tensor:
    """Correlated float64 features with variances from 1 to 1e-4 and mean 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    mixing = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    rotation, _ = torch.linalg.qr(mixing)
    return (x * torch.logspace(0, -2, dim, dtype=torch.float64)) @ rotation


def covariance_of(x: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    streaming = StreamingCovariance(x.shape[-1], device=x.device, **options)
    streaming.update(x, mask)
    return streaming.covariance().cpu()


def oracle(x: Tensor) -> Tensor:
    flat = x.detach().cpu().double().reshape(-1, x.shape[-1]).numpy()
    return torch.from_numpy(np.cov(flat, rowvar=False).reshape(x.shape[-1], x.shape[-1]))


def entry_error(measured: Tensor, expected: Tensor) -> float:
    """The largest error of an entry, relative to the two standard deviations."""
    deviation = expected.diagonal().sqrt()
    return ((measured - expected).abs() / torch.outer(deviation, deviation)).max().item()


def assert_same_spectrum(measured: Tensor, expected: Tensor, *, entropy: float, ratio: float):
    got, want = eigenvalues(measured), eigenvalues(expected)
    assert abs(spectral_entropy(got) - spectral_entropy(want)) <= entropy
    relative = participation_ratio(got) / participation_ratio(want) - 1
    assert abs(relative) <= ratio


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-6),
        (torch.bfloat16, 1e-5),
        (torch.float16, 1e-5),
    ],
)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_covariance_agrees_with_float64_numpy(device, dtype, tolerance, mean):
    x = (draw() + mean).to(device, dtype)
    assert entry_error(covariance_of(x), oracle(x)) <= tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_a_large_mean_costs_no_digits(device, mean):
    x = (draw() / draw().std(0) + mean).float().to(device)
    assert_same_spectrum(covariance_of(x), oracle(x), entropy=1e-6, ratio=1e-6)


def test_the_naive_float32_formula_fails():
    """The tolerance of the previous test distinguishes the two formulas, so that test can fail."""
    x = (draw() / draw().std(0) + 1e2).float()
    n, mean = x.shape[0], x.mean(0)
    naive = ((x.T @ x - n * torch.outer(mean, mean)) / (n - 1)).double()
    values, expected = torch.linalg.eigvalsh(naive), torch.linalg.eigvalsh(oracle(x))
    ratio = participation_ratio(values.clamp(min=0)) / participation_ratio(expected) - 1
    assert abs(ratio) > 1e-5


@pytest.mark.parametrize("product", ["float32", "float16x2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_16_bit_features_stay_within_1e_5_of_float64(product, dtype, mean):
    """SE absolute, PR relative. A device without a float16 product that sums in float32 converts to
    float32, in which products of 11-digit numbers are equally exact."""
    x = (draw(6000, 64) / draw(6000, 64).std(0) + mean).to(dtype)
    measured = covariance_of(x, product=product)
    assert_same_spectrum(measured, oracle(x), entropy=1e-5, ratio=1e-5)


def test_float16x2_without_the_low_half_fails_the_same_tolerance(monkeypatch):
    def high_only(total: Tensor, y: Tensor) -> None:
        total.add_(y.half().float().T @ y.half().float())

    monkeypatch.setitem(PRODUCTS, "float16x2", replace(PRODUCTS["float16x2"], add=high_only))
    x = draw(2000).bfloat16()
    assert entry_error(covariance_of(x, product="float16x2"), oracle(x)) > 1e-5


@pytest.mark.parametrize("exponent", range(-8, 9, 4))
def test_metrics_do_not_depend_on_the_scale_of_the_features(exponent):
    x = draw()
    scaled = (x * 10.0**exponent).float()
    assert_same_spectrum(covariance_of(scaled), oracle(x), entropy=1e-6, ratio=1e-6)


@pytest.mark.parametrize("product", ["float32", "float16x2"])
@pytest.mark.parametrize("scale", [1e-28, 1e28, 3e37])
def test_squares_and_sums_may_exceed_the_range_of_float32(product, scale):
    x = (draw() * scale).float()
    assert entry_error(covariance_of(x, product=product), oracle(x)) <= 1e-6


@pytest.mark.parametrize("product", PRODUCTS)
def test_scaling_by_a_power_of_two_is_exact(product):
    x = draw(200).float()
    scaled = covariance_of(x * 2.0**-40, product=product)
    assert torch.equal(scaled * 2.0**80, covariance_of(x, product=product))


@pytest.mark.parametrize("product", ["float32", "float16x2"])
def test_columns_of_very_different_scales_keep_their_own_digits(product):
    x = (draw() * torch.logspace(0, -15, DIM, dtype=torch.float64)).float()
    assert entry_error(covariance_of(x, product=product), oracle(x)) <= 1e-6


def test_rotating_the_features_does_not_change_the_spectrum():
    x = draw()
    rotation, _ = torch.linalg.qr(draw(DIM, DIM, seed=3))
    rotated = (x @ rotation).float()
    assert_same_spectrum(covariance_of(rotated), oracle(x), entropy=1e-6, ratio=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_splitting_merging_and_shuffling_change_nothing(device):
    """One update, uneven updates, merged accumulators and shuffled samples agree to 1e-12 in
    float64."""
    x = (draw() + torch.arange(DIM) * 100).to(device)
    x[700:] += 5  # parts with means of their own
    expected = oracle(x)
    parts = x.split([1, 700, 99, 700])

    updated = StreamingCovariance(DIM, device=device)
    for part in parts:
        updated.update(part)
    left, right = (StreamingCovariance(DIM, device=device) for _ in range(2))
    for part in parts[:2]:
        left.update(part)
    for part in parts[2:]:
        right.update(part)
    seen = right.covariance()
    left.merge(right)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]

    for measured in (updated.covariance(), left.covariance(), covariance_of(shuffled)):
        assert entry_error(measured.cpu(), expected) <= 1e-12
    assert left.n_samples == updated.n_samples == len(x)
    assert torch.equal(right.covariance(), seen)


@pytest.mark.parametrize("n_rows", [1, 7, 1500, 4096])
def test_the_chunk_size_changes_only_rounding(monkeypatch, n_rows):
    monkeypatch.setitem(PRODUCTS, "float64", replace(PRODUCTS["float64"], n_rows=n_rows))
    x = draw() + 5
    assert entry_error(covariance_of(x), oracle(x)) <= 1e-12


def test_merging_with_an_empty_covariance():
    x = draw()
    full, empty = StreamingCovariance(DIM), StreamingCovariance(DIM)
    full.update(x)
    expected = full.covariance()
    full.merge(StreamingCovariance(DIM))
    empty.merge(full)
    assert torch.equal(full.covariance(), expected)
    assert torch.equal(empty.covariance(), expected)
    assert empty.precision == "float64"


def test_all_dimensions_but_the_last_are_samples():
    x = draw(1200)
    assert torch.equal(covariance_of(x.reshape(4, 5, 60, DIM)), covariance_of(x))
    strided = x.reshape(20, 60, DIM).transpose(0, 1)
    assert entry_error(covariance_of(strided), oracle(x)) <= 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_samples_do_not_count_whatever_their_values(device, dtype):
    x = (draw(1200) + 50).to(device, dtype).reshape(20, 60, DIM)
    mask = torch.rand(20, 60, generator=torch.Generator().manual_seed(2)).to(device) < 0.4
    mask[0] = False
    expected = oracle(x[mask])
    x[~mask] = torch.nan
    x[1, 0] = torch.where(mask[1, 0], x[1, 0], torch.inf)
    streaming = StreamingCovariance(DIM, device=device)
    streaming.update(x[:7], mask[:7])
    streaming.update(x[7:], mask[7:])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert entry_error(streaming.covariance().cpu(), expected) <= tolerance
    assert streaming.n_samples == int(mask.sum())


def test_a_mask_that_excludes_all_samples_adds_nothing():
    streaming = StreamingCovariance(DIM)
    streaming.update(torch.full((5, DIM), torch.nan), torch.zeros(5, dtype=torch.bool))
    assert streaming.n_samples == 0
    streaming.update(draw())
    before = streaming.covariance()
    streaming.update(torch.full((5, DIM), torch.nan), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(streaming.covariance(), before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7e5])
def test_a_dead_layer_has_exactly_no_variance(device, product, value):
    """Also after several updates, where differently rounded means would create variance."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        streaming = StreamingCovariance(DIM, device=device, product=product)
        for n in (7, 1000, 3001):
            streaming.update(torch.full((n, DIM), value, dtype=dtype, device=device))
        assert streaming.covariance().count_nonzero() == 0


@pytest.mark.parametrize("product", [name for name in PRODUCTS if PRODUCTS[name].centered])
@pytest.mark.parametrize("value", [3e38, -1e36, 1e-40])
def test_a_constant_column_has_no_variance_and_does_not_affect_others(product, value):
    """At any magnitude: scaling must not make the column overflow."""
    x = draw(300).float()
    x[:, 5] = value
    measured, expected = covariance_of(x, product=product), oracle(x)
    assert (measured[5] == 0).all()
    others = torch.arange(DIM) != 5
    error = entry_error(measured[others][:, others], expected[others][:, others])
    assert error <= 2e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("product", PRODUCTS)
def test_one_value_that_is_not_finite_makes_all_entries_nan(product, value):
    streaming = StreamingCovariance(DIM, product=product)
    x = draw(100)
    x[17, 3] = value
    streaming.update(x)
    streaming.update(draw())
    assert streaming.covariance().isnan().all()
    assert streaming.n_samples == 1600


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_covariance(n):
    streaming = StreamingCovariance(DIM)
    streaming.update(draw()[:n])
    assert streaming.n_samples == n
    assert streaming.covariance().isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", PRODUCTS)
def test_the_covariance_is_float64_and_exactly_symmetric(dtype, product):
    covariance = covariance_of((draw() + 3).to(dtype), product=product)
    assert covariance.dtype == torch.float64
    assert torch.equal(covariance, covariance.T)


def test_features_and_mask_are_unchanged_and_no_graph_is_kept():
    x = draw(100).requires_grad_()
    mask = torch.arange(100) % 3 > 0
    before, mask_before = x.detach().clone(), mask.clone()
    streaming = StreamingCovariance(DIM)
    streaming.update(x, mask)
    assert torch.equal(x, before)
    assert torch.equal(mask, mask_before)
    assert not streaming.covariance().requires_grad


def test_updates_inside_and_outside_inference_mode_can_be_mixed():
    x = draw()
    with torch.inference_mode():
        streaming = StreamingCovariance(DIM)
        inside = x[:700].clone()
        streaming.update(inside)
    streaming.update(x[700:])
    streaming.update(inside[:0])
    assert entry_error(streaming.covariance(), oracle(x)) <= 1e-12


def test_precision_names_the_coarsest_product_used():
    streaming = StreamingCovariance(DIM)
    with pytest.raises(MeasurementError, match="first update"):
        _ = streaming.precision
    streaming.update(draw())
    assert streaming.precision == "float64"
    streaming.update(draw().bfloat16())
    assert streaming.precision == "float32"
    forced = StreamingCovariance(DIM, product="float16x2")
    forced.update(draw().bfloat16())
    streaming.merge(forced)
    assert streaming.precision == "float16x2"


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: StreamingCovariance(0), "dim = 0"),
        (
            lambda: StreamingCovariance(4, product="tf32"),
            "bfloat16, float16x2, float32, float64.*'tf32'",
        ),
        (lambda: StreamingCovariance(4).update(torch.ones(3, 5)), r"dimension of 4.*\(3, 5\)"),
        (lambda: StreamingCovariance(4).merge(StreamingCovariance(5)), "4 and 5"),
    ],
)
def test_misuse_raises_an_error_that_names_it(action, message):
    with pytest.raises(MeasurementError, match=message):
        action()


def test_a_mask_of_the_wrong_shape_raises(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it
    with pytest.raises(MeasurementError, match=r"one boolean a sample, \(2, 3\).*\(3, 2\)"):
        StreamingCovariance(4).update(torch.ones(2, 3, 4), torch.ones(3, 2) > 0)


@pytest.mark.cuda
@pytest.mark.parametrize("rank", [768, 3072])
@pytest.mark.parametrize("mean", [0.0, 0.45, 0.95, 1.5, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_cores_stay_within_1e_5_of_float64_at_full_size(dtype, mean, rank):
    """Also if most eigenvalues are nearly 0, as before the nonlinearity."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(65536, rank, device="cuda", generator=generator)
    spectrum = torch.arange(1, rank + 1, device="cuda") ** -0.5
    rotation, _ = torch.linalg.qr(torch.randn(3072, 3072, device="cuda", generator=generator))
    x = (x * spectrum) @ rotation[:rank]
    x = (x / x.std(0) + mean).to(dtype)
    measured, expected = StreamingCovariance(3072, device="cuda"), torch.cov(x.double().T)
    measured.update(x)
    raw = dtype == torch.bfloat16 and mean < 1
    assert measured.precision == ("bfloat16" if raw else "float16x2")
    assert_same_spectrum(measured.covariance(), expected, entropy=1e-5, ratio=1e-5)


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_update_with_centered_products_does_not_wait_for_the_device(dtype):
    x = draw().to("cuda", dtype)
    product = "float16x2" if dtype == torch.bfloat16 else None
    streaming = StreamingCovariance(DIM, device="cuda", product=product)
    for _ in range(2):  # libraries are set up in the first calls
        streaming.update(x)
        streaming.merge(streaming)
        streaming.covariance()
    try:
        torch.cuda.set_sync_debug_mode("error")
        streaming.update(x)
        streaming.merge(streaming)
        covariance = streaming.covariance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert covariance.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("mean", "scale", "taken"),
    [
        (0.0, 1.0, "bfloat16"),
        (0.3, 1.0, "bfloat16"),
        (10.0, 1.0, "float16x2"),
        (0.0, 1e-3, "bfloat16"),
        (0.0, 1e-18, "float16x2"),
    ],
)
def test_uncentered_products_are_replaced_if_they_would_lose_digits(mean, scale, taken, masked):
    """The arithmetic of tensor cores with products in float32; within 1e-5 in both cases."""
    x = draw()
    x = ((x / x.std() + mean) * scale).to(torch.bfloat16)
    mask = torch.arange(len(x)) % 3 > 0 if masked else None
    if mask is not None:
        x[~mask] = torch.nan
    streaming = StreamingCovariance(DIM, product="bfloat16")
    streaming.update(x, mask)
    expected = oracle(x if mask is None else x[mask])
    assert streaming.precision == taken
    assert_same_spectrum(streaming.covariance(), expected, entropy=1e-5, ratio=1e-5)


def scatter_of(parts: list[Tensor], dim: int = DIM) -> Tensor:
    """The expected lower triangle, from float64 NumPy."""
    x = torch.cat([part.double().reshape(-1, dim) for part in parts])
    return (oracle(x) * (len(x) - 1)).tril() if len(x) > 1 else torch.zeros(dim, dim).double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("sizes", [[2], [300], [5, 900, 30, 400]])
def test_the_lower_triangle_of_the_scatter_is_n_minus_1_times_the_covariance(
    device, product, sizes
):
    parts = [(draw(n, seed=n) + 3 * i).to(device, torch.bfloat16) for i, n in enumerate(sizes)]
    streaming = StreamingCovariance(DIM, device=device, product=product)
    for part in parts:
        streaming.update(part)
    expected = scatter_of([part.cpu() for part in parts])
    assert entry_error(streaming.scatter().tril().cpu(), expected) <= 1e-5
    mirrored = streaming.covariance() * (sum(sizes) - 1)
    torch.testing.assert_close(mirrored.tril(), streaming.scatter().tril(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("product", [None, *PRODUCTS])
@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("feature", [0, 7, DIM - 1])
def test_features_that_are_not_finite_appear_in_the_lower_triangle(value, product, n, feature):
    streaming = StreamingCovariance(DIM, product=product)
    x = draw(n)
    x[5, feature] = value
    streaming.update(x)
    assert eigenvalues(streaming.eigenproblem()).isnan().all()
    assert eigenvalues(streaming.scatter()).isnan().all()
    streaming.update(draw())
    assert eigenvalues(streaming.eigenproblem()).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-5)]
)
@pytest.mark.parametrize("mean", [0.0, 1e3])
@pytest.mark.parametrize("n", [2, 3, 11, DIM - 1, DIM, DIM + 1, 2 * DIM, 1500])
def test_the_eigenproblem_has_the_spectrum_of_the_covariance(device, dtype, tolerance, mean, n):
    """N x N with at most as many samples as features, otherwise dim x dim."""
    x = (draw(n) / draw().std(0) + mean).to(device, dtype)
    streaming = StreamingCovariance(DIM, device=device)
    for part in x.split([1, n - 1]):
        streaming.update(part)
    matrix = streaming.eigenproblem()
    assert matrix.shape == ((n, n) if n <= DIM else (DIM, DIM))
    measured = eigenvalues(matrix, DIM).cpu() / (n - 1)
    expected = torch.from_numpy(np.linalg.eigvalsh(oracle(x).numpy())[::-1].copy())
    assert ((measured - expected).abs().max() / expected.max()).item() <= tolerance
    direct = eigenvalues(streaming.covariance()).cpu()
    assert ((direct - expected).abs().max() / expected.max()).item() <= tolerance


@pytest.mark.parametrize("n", [0, 1])
def test_the_spectrum_of_fewer_than_two_samples_is_zero(n):
    streaming = StreamingCovariance(DIM)
    streaming.update(draw()[:n])
    assert eigenvalues(streaming.eigenproblem(), DIM).tolist() == [0] * DIM
    assert streaming.scatter().tril().count_nonzero() == 0


def test_held_samples_are_copies_in_their_own_dtype_and_solved_in_float64():
    """Of different dtypes, some masked, and overwritten after the update, as by an in-place
    ReLU."""
    streaming, expected = StreamingCovariance(DIM), []
    for dtype, n in ((torch.float32, 5), (torch.bfloat16, 4), (torch.float64, 6)):
        x = (draw(n, seed=n) + 20).to(dtype)
        mask = torch.arange(n) != 2
        expected.append(x[mask].double())
        x[2] = torch.nan
        streaming.update(x, mask)
        x.zero_()
    assert streaming.n_samples == 12
    assert streaming.precision == "float64"
    measured = eigenvalues(streaming.eigenproblem(), DIM)
    want = eigenvalues(scatter_of(expected))
    torch.testing.assert_close(measured, want, rtol=0, atol=1e-13 * float(want[0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_held_samples_of_a_dead_layer_have_exactly_no_variance(dtype):
    streaming = StreamingCovariance(DIM)
    for n in (3, 8):
        streaming.update(torch.full((n, DIM), 0.1, dtype=dtype))
    assert eigenvalues(streaming.eigenproblem(), DIM).count_nonzero() == 0


def test_a_named_product_is_used_from_the_first_sample():
    streaming = StreamingCovariance(DIM, product="float16x2")
    streaming.update(draw(5))
    assert streaming.eigenproblem().shape == (DIM, DIM)
    assert streaming.precision == "float16x2"


@pytest.mark.parametrize("sizes", [(3, 5, 8), (3, 5, 20), (3, 5, 100), (0, 40, 2), (60, 1, 50)])
def test_merging_in_any_order_equals_one_accumulator(sizes):
    """Some hold samples and some moments; merging leaves its source unchanged."""
    parts = [draw(n, seed=i) + 10 * i for i, n in enumerate(sizes)]
    accumulators = []
    for part in parts:
        accumulators.append(StreamingCovariance(DIM))
        accumulators[-1].update(part)
    before = [accumulator.eigenproblem().clone() for accumulator in accumulators]
    expected = scatter_of(parts)
    want = eigenvalues(expected)
    for order in permutations(accumulators):
        merged = StreamingCovariance(DIM)
        for accumulator in order:
            merged.merge(accumulator)
        assert merged.n_samples == sum(sizes)
        measured = eigenvalues(merged.eigenproblem(), DIM)
        torch.testing.assert_close(measured, want, rtol=0, atol=1e-12 * float(want[0]))
        assert entry_error(merged.scatter().tril(), expected) <= 1e-12
    for accumulator, seen in zip(accumulators, before, strict=True):
        assert torch.equal(accumulator.eigenproblem(), seen)


@pytest.mark.parametrize("n", [4, 100])
def test_merging_with_itself_doubles_the_samples(n):
    x = draw(n) + 3
    streaming = StreamingCovariance(DIM)
    streaming.update(x)
    streaming.merge(streaming)
    assert streaming.n_samples == 2 * n
    assert entry_error(streaming.scatter().tril(), scatter_of([x, x])) <= 1e-12


def test_samples_can_be_added_after_a_tally_in_inference_mode():
    x = draw(40, seed=3)
    accumulator = StreamingCovariance(DIM)
    accumulator.update(x[:3])
    with torch.inference_mode():
        assert accumulator.tally().n == 3
    accumulator.update(x[3:])
    assert entry_error(accumulator.scatter().tril(), scatter_of([x])) <= 1e-12


def test_the_blocks_of_the_triangle_form_the_whole_product():
    x = torch.randn(40, 1026, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(covariance_of(x), torch.cov(x.T), rtol=1e-12, atol=1e-12)
