"""Constraints hold during training with every optimizer in its configured form."""

from functools import cache

import pytest
import torch
from support import composed
from torch.nn import functional as F

from nerve.cli.config.compose import CONF, build, resolved
from nerve.measuring.find import find_ffns
from nerve.models import build_model
from nerve.optim import Part, build_optimizer

OPTIMIZERS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))
SIZES = ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.seq_len=16"]


@cache
def trained(optimizer: str, constraint: str) -> torch.nn.Module:
    """A small GPT after 20 steps of `optimizer` at its configured rate."""
    factors = [f"optimizer={optimizer}", f"ffn.constraint={constraint}", "ffn=gated"]
    config = composed(*SIZES, *factors)
    groups = ("model", "normalization", "activation", "position", "ffn")
    values = {group: resolved(config[group]) for group in groups}
    model = build_model(values, seed=0, vocab_size=17)
    parts = {
        str(name): Part(tuple(part.roles), part.build)
        for name, part in build(config.optimizer.parts, key="optimizer.parts").items()
    }
    stepper = build_optimizer(model, parts)
    tokens = torch.randint(17, (20, 4, 17), generator=torch.Generator().manual_seed(0))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for batch in tokens:
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
    assert any((before[n] - p).abs().max() > 1e-4 for n, p in model.named_parameters())
    return model


def matrices(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for ffn in find_ffns(model) for m in (ffn.up, ffn.gate, ffn.down)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hyperspherical_rows_stay_on_the_sphere(optimizer):
    for matrix in matrices(trained(optimizer, "hyperspherical")):
        torch.testing.assert_close(
            matrix.weight.norm(dim=1), torch.ones(len(matrix.weight)), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_norm_rows_have_the_length_of_their_magnitude(optimizer):
    for matrix in matrices(trained(optimizer, "weight_norm")):
        magnitude = matrix.parametrizations.weight.original0
        assert magnitude.shape == (len(matrix.weight), 1)
        torch.testing.assert_close(
            matrix.weight.norm(dim=1), magnitude[:, 0].abs(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_spectral_norm_is_one_in_training(optimizer):
    """Up to the drift that 20 power iterations leave: a few percent at the highest learning
    rates."""
    for matrix in matrices(trained(optimizer, "spectral_norm").eval()):
        largest = torch.linalg.matrix_norm(matrix.weight, 2).item()
        assert 0.9 < largest < 1.1
