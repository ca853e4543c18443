"""Shares of the mean and of the farthest samples agree with float64 NumPy, or are NaN."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nerve.spectra import SampleShares, Shares, StreamingCovariance

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def shares_of(x: Tensor, *, sizes: int | list[int] | None = None) -> Shares:
    found = SampleShares(x.shape[-1], device=x.device)
    for batch in x.split(len(x) if sizes is None else sizes):
        found.update(batch)
    return Shares(*found.shares().tolist())


def oracle(x: Tensor) -> Shares:
    """The definitions, with the mean of all samples; the second of three dimensions is the
    position."""
    flat = x.double().cpu().reshape(-1, x.shape[-1]).numpy()
    mean = flat.mean(0)
    squares = np.square(flat - mean).sum(1)
    of_position = np.nan
    if x.ndim == 3 and len(x) >= 8:
        of_position = squares.reshape(x.shape[:2]).mean(0).max() / squares.mean()
    squares = np.sort(squares)[::-1]
    n_top = math.ceil(len(flat) / 1000)
    return Shares(
        mean=len(flat) * np.square(mean).sum() / np.square(flat).sum(),
        largest=squares[0] / squares.sum(),
        top=squares[:n_top].sum() / squares.sum(),
        position=of_position,
    )


def draw(n: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) * torch.logspace(0, -1, dim)


def test_one_sample_that_differs_has_the_share_of_the_closed_form():
    """N - 1 samples at 0 and one at a: its distance from the mean is a (N-1)/N, that of the others
    a/N."""
    n, a = 40, 3.0
    x = torch.zeros(n, 5)
    x[17, 2] = a
    found = shares_of(x, sizes=9)
    assert found.largest == pytest.approx((n - 1) / n)
    assert found.top == found.largest  # one of 40 samples is at least 0.1%
    assert found.mean == pytest.approx(1 / n)


def test_two_opposite_samples_have_half_each_and_no_mean():
    x = torch.zeros(30, 4)
    x[3, 1], x[20, 1] = 2.0, -2.0
    assert shares_of(x)[:3] == pytest.approx((0, 0.5, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_for_equal_samples_the_share_of_the_mean_is_1(dtype):
    found = shares_of(torch.full((20_000, 6), 0.7, dtype=dtype))
    assert found.mean == 1
    assert math.isnan(found.largest)


@pytest.mark.parametrize("sizes", [2500, 1000, 37])
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_shares_agree_with_float64_numpy(sizes, offset, dtype, device):
    x = (draw(2500, 48) + offset).to(device, dtype)
    assert shares_of(x, sizes=sizes) == pytest.approx(oracle(x), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("exponent", [-90, -30, 30, 90])
def test_scale_does_not_matter(exponent):
    x = draw(500, 8).reshape(50, 10, 8)
    assert shares_of(x * 2.0**exponent, sizes=7) == pytest.approx(shares_of(x, sizes=7))


def test_rotations_and_the_order_of_samples_do_not_matter():
    x = draw(3000, 16).double()
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    moved = (x @ rotation)[order]
    assert shares_of(moved, sizes=300) == pytest.approx(
        shares_of(x, sizes=300), rel=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("position", [0, 1499, 2999])
@pytest.mark.parametrize("factor", [3, 30, 1000])
def test_a_planted_sample_is_found_at_any_place(position, factor):
    x = draw(3000, 32)
    x[position] *= factor * x.norm(dim=1).median() / x[position].norm()
    found, expected = shares_of(x, sizes=200), oracle(x)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4)
    if (position, factor) != (
        0,
        1000,
    ):  # there the mean begins too far away for the second and third
        assert found.top == pytest.approx(expected.top, rel=1e-4)


@pytest.mark.parametrize("n_cases", [75, pytest.param(1000, marks=pytest.mark.slow)])
def test_an_uncertain_share_is_nan_and_never_wrong(n_cases):
    """The mean moves by more than samples stand out: there are fewer candidates than samples, and
    the batches have different means and spreads. Every share is NaN or equals the oracle's; both
    occur, and most are known."""
    generator = torch.Generator().manual_seed(3)
    n_nan = n_known = 0
    for case in range(n_cases):
        dim = int(torch.randint(2, 40, (), generator=generator))
        batches = []
        for _ in range(int(torch.randint(2, 30, (), generator=generator))):
            n = int(torch.randint(1, 400, (), generator=generator))
            center = torch.randn(dim, generator=generator) * 10 ** (case % 3 - 1)
            spread = torch.rand((), generator=generator) + 0.1
            batches.append(center + spread * torch.randn(n, dim, generator=generator))
        found = SampleShares(dim)
        for batch in batches:
            found.update(batch)
        for value, expected in zip(
            found.shares().tolist()[:3], oracle(torch.cat(batches))[:3], strict=True
        ):
            n_nan += math.isnan(value)
            n_known += not math.isnan(value)
            assert math.isnan(value) or value == pytest.approx(expected, rel=1e-5)
    assert n_nan > n_cases / 15
    assert n_known > 2 * n_cases


def test_masked_samples_do_not_count():
    x = draw(400, 8).reshape(20, 20, 8)
    mask = torch.rand(20, 20, generator=torch.Generator().manual_seed(2)) > 0.3
    found = SampleShares(8)
    found.update(torch.where(mask[..., None], x, torch.nan), mask)
    assert found.n == int(mask.sum())
    assert found.shares().tolist()[:3] == pytest.approx(oracle(x[mask])[:3], rel=1e-6)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_have_no_shares(n):
    found = SampleShares(3)
    found.update(torch.ones(n, 3))
    assert found.shares().isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_shares(value):
    x = draw(300, 4)
    x[7, 2] = value
    found = SampleShares(4)
    for batch in x.split(100):
        found.update(batch)
    assert found.shares().isnan().all()


def test_memory_does_not_grow_with_the_number_of_samples():
    found = SampleShares(64)
    for seed in range(40):
        found.update(draw(500, 64, seed))
    assert found._candidates is not None
    assert len(found._candidates) == 4 * 20  # four times 0.1% of 20,000
    assert len(found._bounds) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [40, 7])
def test_the_farthest_position_agrees_with_float64_numpy(dtype, sizes):
    x = (draw(40 * 12, 24).reshape(40, 12, 24) + 30).to(dtype)
    x[:, 5] *= 1.5
    assert shares_of(x, sizes=sizes) == pytest.approx(oracle(x), rel=1e-5)


def test_a_position_with_all_the_variance_has_a_ratio_of_the_number_of_positions():
    x = torch.zeros(20, 16, 4)
    x[::2, 3, 1], x[1::2, 3, 1] = 2.0, -2.0
    assert shares_of(x, sizes=6).position == pytest.approx(16)


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_of_masked_sequences_of_different_lengths(side):
    """Only samples that exist count; a position counts if at least 8 sequences reach it. Positions
    count from the first sample of a sequence, whichever side is padded."""
    sequences = [draw(length, 6, seed=length) for length in range(1, 25)]
    for x in sequences:
        x[2:3] *= 3
    found = SampleShares(6)
    for first in range(0, 24, 5):
        batch = torch.nn.utils.rnn.pad_sequence(
            sequences[first : first + 5],
            batch_first=True,
            padding_value=math.nan,
            padding_side=side,
        )
        found.update(batch, ~batch[..., 0].isnan())
    every = torch.cat(sequences).double()
    square = [(x.double() - every.mean(0)).square().sum(1) for x in sequences]
    of_position = [torch.stack([s[p] for s in square if len(s) > p]).mean() for p in range(17)]
    expected = max(of_position) / torch.cat(square).mean()
    assert Shares(*found.shares().tolist()).position == pytest.approx(float(expected))


@pytest.mark.parametrize("shapes", [[(96, 6)], [(96, 1, 6)], [(7, 12, 6)], [(9, 4, 6), (36, 6)]])
def test_features_without_positions_have_no_farthest_position(shapes):
    found = SampleShares(6)
    for seed, shape in enumerate(shapes):
        found.update(draw(math.prod(shape[:-1]), 6, seed).reshape(shape))
    shares = Shares(*found.shares().tolist())
    assert math.isnan(shares.position)
    assert shares.largest > 0


def test_merging_covariances_does_not_change_the_shares():
    """The covariance takes the mean of the first samples from their spread, and then moves its own
    mean."""
    x = (draw(3000, 48) * torch.linspace(3, 1, 3000)[:, None]).bfloat16()
    alone, beside = SampleShares(48), SampleShares(48)
    covariance = StreamingCovariance(48, product="bfloat16")
    for batch in (x[:1500], x[1500:] + 0.2):
        alone.update(batch)
        covariance.update(batch, None, beside.update(batch))
    assert covariance.precision == "bfloat16"
    other = StreamingCovariance(48)
    other.update(x[:100] + 1)
    covariance.merge(other)
    for found, expected in (
        (beside.shares(), alone.shares()),
        (beside.about(beside.mean).reach, alone.about(alone.mean).reach),
        (beside.mean, alone.mean),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
