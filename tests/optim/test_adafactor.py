"""Batched Adafactor: the updates and state of torch's, and fewer operations."""

import copy

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
