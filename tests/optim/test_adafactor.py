"""Batched Adafactor: the updates and state of torch's, and fewer operations."""

import copy
import math
from typing import Any

import pytest
import torch
from operations import Operations
from torch import nn

from nerve.optim import Adafactor

SHAPES = [(24, 8), (8, 24), (8,), (24,)] * 3


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(n):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=generator) * each.numel()
        if step % 2:
            parameters[4].grad = None  # one that this step does not reach
        optimizer.step()


SETTINGS = [
    {},
    {"lr": 0.1, "weight_decay": 0.3},
    {"eps": (1e-3, 0.5), "d": 2.0, "beta2_decay": -0.5, "maximize": True},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_twenty_updates_are_those_of_torch_up_to_rounding(settings):
    mine, others, both = weights(), weights(), weights()
    train(Adafactor(mine, **settings), mine, 20)
    train(torch.optim.Adafactor(others, **settings), others, 20)
    train(torch.optim.Adafactor(both, **settings, foreach=True), both, 20)
    for one, other, third, before in zip(mine, others, both, weights(), strict=True):
        moved = (other - before).norm()
        assert moved > 0
        assert (one - other).norm() <= 1e-5 * moved
        assert (third - other).norm() <= 1e-5 * moved


def test_it_goes_on_from_the_state_of_torch_and_torch_from_its_state():
    mine, others = weights(), weights()
    first, second = Adafactor(mine, lr=0.1), torch.optim.Adafactor(others, lr=0.1)
    for ours, theirs in ((first, second), (second, first)):
        trained, resumed = (o.param_groups[0]["params"] for o in (theirs, ours))
        train(theirs, trained, 3)
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        with torch.no_grad():
            for one, other in zip(resumed, trained, strict=True):
                one.copy_(other)
        train(ours, resumed, 3)
        train(theirs, trained, 3)
        for one, other in zip(resumed, trained, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert first.state_dict()["state"][0].keys() == second.state_dict()["state"][0].keys()


def test_more_parameters_of_a_shape_need_no_more_operations_and_only_steps_are_read():
    """The number of steps of each parameter is on the host, where torch's Adafactor keeps it."""

    def operations_of(n: int) -> Operations:
        parameters = [nn.Parameter(torch.randn(8, 4)) for _ in range(n)]
        optimizer = Adafactor(parameters)
        for each in parameters:
            each.grad = torch.ones_like(each)
        optimizer.step()
        with Operations() as operations:
            optimizer.step()
        return operations

    few, many = operations_of(2), operations_of(8)
    assert (few.n_read, many.n_read) == (2 + 1, 8 + 1), "each count, and that of their list"
    assert few.n - 2 == many.n - 8, "beside the counting of the steps"


def after_three(kind: type[torch.optim.Optimizer], dtype: torch.dtype, bad: float) -> list[Any]:
    """Weights of 0 to 4 axes after updates, one of whose gradients has a number that is `bad`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (), (5,), (5,), (4, 3), (2, 4, 3), (2, 3, 4, 3)]
    parameters = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = kind(parameters)
    for _ in range(3):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=generator).to(dtype)
        parameters[2].grad[1] *= bad
        optimizer.step()
    return [each.detach() for each in parameters]


@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_number_of_axes_and_non_finite_gradients_are_as_in_torch(dtype, bad):
    mine, others = (after_three(kind, dtype, bad) for kind in (Adafactor, torch.optim.Adafactor))
    for one, other in zip(mine, others, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert mine[2].isfinite().all() == math.isfinite(bad)


def test_a_learning_rate_below_the_smallest_number_of_16_bits_still_moves_weights():
    """The update of a diagonal is 8^½, and 2e-5 · 1e-3 · 8^½ rounds to float16's smallest number,
    2^-24; 2e-5 · 1e-3 alone rounds to 0."""
    weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.float16))
    weight.grad = torch.eye(8, dtype=torch.float16)
    Adafactor([weight], lr=2e-5, eps=(1e-3, 1e-3)).step()
    assert torch.equal(weight, -(2.0**-24) * torch.eye(8, dtype=torch.float16))


@pytest.mark.parametrize("kind", [Adafactor, torch.optim.Adafactor])
def test_sparse_gradients_and_complex_weights_are_refused_in_torchs_words(kind):
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        kind(embedding.parameters()).step()
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="does not support complex parameters"):
        kind([weight]).step()
