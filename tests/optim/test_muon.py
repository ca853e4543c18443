"""Batched Muon: the updates and state of torch's Muon, and fewer products."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nerve.optim import Muon
from nerve.optim.muon import orthogonalized

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = [(24, 8), (8, 24), (8, 8)] * 3


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], n: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        for each in parameters:
            each.grad = torch.randn(each.shape, generator=generator)
        parameters[4].grad = None  # one that this step does not reach
        optimizer.step()


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.5}]
)
def test_updates_are_those_of_torch_up_to_rounding_of_bfloat16(settings):
    mine, others = weights(), weights()
    train(Muon(mine, lr=0.1, **settings), mine, 5)
    train(torch.optim.Muon(others, lr=0.1, **settings), others, 5)
    for one, other, before in zip(mine, others, weights(), strict=True):
        moved = (other - before).norm()
        assert (one - other).norm() <= 2**-7 * moved
    assert torch.equal(mine[4], weights()[4])


def test_it_goes_on_from_the_state_of_torch():
    mine, others = weights(), weights()
    first, second = Muon(mine, lr=0.1), torch.optim.Muon(others, lr=0.1)
    train(second, others, 3)
    first.load_state_dict(copy.deepcopy(second.state_dict()))
    with torch.no_grad():
        for one, other in zip(mine, others, strict=True):
            one.copy_(other)
    train(first, mine, 1)
    train(second, others, 1)
    for one, other in zip(mine, others, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    assert first.state_dict()["state"][0].keys() == second.state_dict()["state"][0].keys()


@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (4, 4)])
def test_orthogonalizing_applies_the_polynomial_to_singular_values(shape):
    """Checked independently with an SVD in NumPy."""
    matrices = np.random.default_rng(0).normal(size=(5, *shape))
    found = orthogonalized(torch.from_numpy(matrices), COEFFICIENTS, 5, 1e-7)
    a, b, c = COEFFICIENTS
    for matrix, mine in zip(matrices, found, strict=True):
        left, s, right = np.linalg.svd(matrix, full_matrices=False)
        s = s / np.linalg.norm(s)
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
        np.testing.assert_allclose(mine, left * s @ right, rtol=0, atol=1e-12)


class Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self):
        super().__init__()
        self.n = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_the_number_of_kernels_is_that_of_the_shapes():
    parameters = weights()
    optimizer = Muon(parameters, lr=0.1)
    for each in parameters:
        each.grad = torch.ones_like(each)
    optimizer.step()
    with Calls() as calls:
        optimizer.step()
    assert (calls.n["bmm"], calls.n["baddbmm"]) == (3 * 5, 3 * 10)
    assert calls.n["mm"] == calls.n["addmm"] == 0
    assert calls.n["_foreach_add_"] == 3


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_on_a_gpu_no_product_is_added_to_in_its_kernel(shape):
    """Shown with tensors without memory: what is called, and what comes out."""
    with FakeTensorMode(), Calls() as calls:
        matrices = torch.empty(12, *shape, device="cuda", dtype=torch.bfloat16)
        found = orthogonalized(matrices, COEFFICIENTS, 5, 1e-7)
    assert (found.shape, found.dtype, found.device.type) == ((12, *shape), torch.bfloat16, "cuda")
    assert calls.n["bmm"] == 15
    assert not [name for name in calls.n if "addmm" in name or "addbmm" in name]


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(512, 512), (2048, 512), (512, 2048)])
def test_on_a_gpu_updates_are_as_exact_as_with_the_addition_in_the_kernel(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, device="cuda")
    exact = orthogonalized(matrices.double(), COEFFICIENTS, 5, 1e-7)
    on_host = orthogonalized(matrices.cpu().bfloat16(), COEFFICIENTS, 5, 1e-7)  # adds in the kernel
    mine = orthogonalized(matrices.bfloat16(), COEFFICIENTS, 5, 1e-7)
    size = exact.norm()
    error, others = ((each.to(exact) - exact).norm() / size for each in (mine, on_host))
    assert error < 1.1 * others < 0.02
