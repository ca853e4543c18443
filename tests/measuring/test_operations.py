"""A measured step does not launch more operations than before, for which small models would wait.

On a GPU, each operation takes about 10 µs of the host, and a step of a small model 3 to 14 ms.
"""

import pytest
import torch
from operations import count
from torch import Tensor, nn

from nerve.measuring.accumulator import Accumulator, eigenproblems
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFNAdapter
from nerve.spectra import SampleShares, Shares, StreamingCovariance
from nerve.spectra.shares import shares_of


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 16, 24, generator=generator).bfloat16()


def test_operations_are_counted_but_views_are_not(x):
    assert count(lambda: x.reshape(-1, 24)[:, 1:].sum(0).add_(1)) == 2


def test_shares_of_the_first_samples_are_not_merged(x):
    shares = SampleShares(24)
    assert count(lambda: shares.update(x)) <= 19
    assert count(lambda: shares.update(x)) <= 48
    assert count(lambda: SampleShares(24)) == 0


@pytest.mark.parametrize(("product", "most"), [("float32", 40), ("float16x2", 56)])
def test_a_covariance_takes_few_operations_besides_its_product(x, product, most):
    """With one block of columns, and without the sum over chunks."""
    spread = SampleShares(24).update(x)
    covariance = StreamingCovariance(24, product=product)
    assert count(lambda: covariance.update(x, None, spread)) <= most


def test_uncentered_products_take_hardly_any_operations(x):
    spread = SampleShares(24).update(x)
    covariance = StreamingCovariance(24, product="bfloat16")
    assert count(lambda: covariance.update(x, None, spread)) <= 13
    assert covariance.precision == "bfloat16"


def test_reading_many_ffns_takes_as_many_operations_as_one(x):
    """Except for those that stack the shares of pre and post of each FFN."""

    def seen(n: int) -> list[Accumulator]:
        up, down = nn.Linear(8, 24), nn.Linear(24, 8)
        several = [
            Accumulator(FFNAdapter(layer, "ffn", up, down), shortcut=True) for layer in range(n)
        ]
        for each in several:
            each.see(x[..., :8], x)
            each.add({"pre": x, "post": x.relu()}, None)
        return several

    one, many = seen(1), seen(12)
    of_one = count(lambda: eigenproblems(one, 1))
    assert of_one <= 40
    assert count(lambda: eigenproblems(many, 1)) == of_one + 11


def test_a_run_of_an_ffn_takes_few_operations(x):
    """Everything that is done with pre, post and the input, except for reading the results."""
    accumulator = Accumulator(
        FFNAdapter(0, "ffn", nn.Linear(8, 24), nn.Linear(24, 8)), shortcut=True
    )

    def take() -> None:
        accumulator.see(x[..., :8], x)
        accumulator.add({"pre": x, "post": x.relu()}, None)
        accumulator.finish_forward()

    assert count(take) <= 135


def test_shares_read_together_equal_those_read_separately(x):
    """Of one size and of several, in any order."""
    several = []
    for n in (40, 9, 40, 1, 9):
        several.append(SampleShares(24))
        several[-1].update(x[:n] + len(several))
    several.append(SampleShares(24))
    together = shares_of(several)
    for each, found in zip(several, together, strict=True):
        torch.testing.assert_close(found, each.shares(), rtol=0, atol=0, equal_nan=True)
    assert len({float(each[0]) for each in together[:3]}) == 3


def test_checking_that_pre_is_affine_takes_few_operations(x):
    up, down = nn.Linear(8, 24), nn.Linear(24, 8)
    accumulator = Accumulator(FFNAdapter(0, "ffn", up, down), shortcut=True)
    assert count(lambda: accumulator.see(x[..., :8], x)) <= 30


def test_a_row_is_computed_once():
    """By the thread that solves, so that the one that writes computes nothing."""
    spectrum = torch.linspace(1, 0, 16, dtype=torch.float64)
    shares = Shares(0.1, 0.2, 0.3, 1.0)
    spectra = FFNSpectra(
        0, "ffn", 100, 8, 16, spectrum, spectrum**2, "float64", shares, shares, 0.5
    )
    assert 0 < count(spectra.row) <= 150
    assert count(spectra.row) == 0
