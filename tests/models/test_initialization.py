"""Initial weights depend on the seed and on each matrix's name, and on nothing else."""

import math

import torch
from torch import nn

from nerve.models.initialization import initialize


class Net(nn.Module):
    def __init__(self, *, extra: bool = False) -> None:
        super().__init__()
        if extra:
            self.extra = nn.Linear(7, 7)
        self.table = nn.Embedding(300, 64)
        self.norm = nn.LayerNorm(64)
        self.inner = nn.Linear(64, 256)
        self.out = nn.Linear(256, 64)


def test_matrices_are_normal_with_the_given_std_and_biases_0() -> None:
    net = Net()
    initialize(net, seed=0, std=0.02, residual_outputs=[net.out], residual_scale=0.25)
    for weight, std in (
        (net.table.weight, 0.02),
        (net.inner.weight, 0.02),
        (net.out.weight, 0.005),
    ):
        standardized = weight.flatten().double() / std
        n = len(standardized)
        # Within 4 standard errors of the moments of a normal distribution.
        assert abs(standardized.mean()) < 4 / math.sqrt(n)
        assert abs(standardized.square().mean() - 1) < 4 * math.sqrt(2 / n)
        assert abs(standardized.pow(4).mean() - 3) < 4 * math.sqrt(96 / n)
    assert not net.inner.bias.any()
    assert not net.out.bias.any()
    assert torch.equal(net.norm.weight, torch.ones(64))


def test_equal_shapes_do_not_get_equal_weights() -> None:
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    initialize(net, seed=0, std=1.0)
    assert not torch.equal(net[0].weight, net[1].weight)


def test_a_layer_that_two_models_share_starts_alike() -> None:
    small, large = Net(), Net(extra=True)
    torch.rand(5)  # the global state has moved
    for net in (small, large):
        initialize(net, seed=7, std=0.02)
    for name, value in small.state_dict().items():
        assert torch.equal(value, large.state_dict()[name])


def test_the_seed_decides() -> None:
    nets = [Net() for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        initialize(net, seed=seed, std=0.02)
    assert torch.equal(nets[0].inner.weight, nets[1].inner.weight)
    assert not torch.equal(nets[0].inner.weight, nets[2].inner.weight)
    # Seeds do not overlap in their draws: the weights are uncorrelated.
    correlation = torch.corrcoef(torch.stack([n.inner.weight.flatten() for n in nets[1:]]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(64 * 256)


def test_the_global_random_state_is_left_alone() -> None:
    net = Net()
    before = torch.get_rng_state()
    initialize(net, seed=0, std=0.02)
    assert torch.equal(torch.get_rng_state(), before)


def test_parameters_on_the_meta_device_are_left_alone() -> None:
    with torch.device("meta"):
        net = Net()
    initialize(net, seed=0, std=0.02)
    assert all(parameter.is_meta for parameter in net.parameters())
