"""The spectral regularizer: the features that it takes from a forward pass, and invalid values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nerve.errors import ConfigError
from nerve.models import Penalty, Regularizer
from nerve.models.gpt import GPT, GPTConfig
from nerve.models.mixer import Mixer, MixerConfig
from nerve.nn.activation import Activation
from nerve.nn.ffn import FeedForward, FFNDesign

TINY = GPTConfig(n_layers=3, d_model=8, n_heads=2, seq_len=6, vocab_size=11, init_std=0.3)
PLAIN = GPT(TINY)
GATED = GPT(replace(TINY, activation=Activation("silu"), ffn=FFNDesign(gated=True)))


def some_tokens(batch: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TINY.vocab_size, (batch, TINY.seq_len), generator=generator)


def log_ratios(model: torch.nn.Module, inputs: Tensor, site: str) -> Tensor:
    """log PR of each FFN in a forward pass, from eigenvalues in float64."""
    found: list[Tensor] = []

    def add(features: Tensor) -> None:
        x = features.detach().double().flatten(0, -2)
        values = torch.linalg.eigvalsh(torch.cov(x.T))
        found.append(2 * values.sum().log() - values.square().sum().log())

    handles = [
        module.pre.register_forward_hook(lambda linear, arguments, output: add(output))
        if site == "pre"
        else module.down.register_forward_pre_hook(lambda linear, arguments: add(arguments[0]))
        for module in model.modules()
        if isinstance(module, FeedForward)
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(found)


def penalty_of(model: torch.nn.Module, inputs: Tensor, regularizer: Regularizer) -> Tensor:
    penalty = Penalty(model, regularizer)
    penalty.start()
    model(inputs)
    return penalty.finish()


@pytest.mark.parametrize("model", [PLAIN, GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("layers", [None, [2], [0, 2]])
def test_the_term_is_the_weighted_sum_over_the_layers(
    model: GPT, site: str, layers: list[int] | None
) -> None:
    regularizer = Regularizer("participation_ratio", -0.5, site, layers)
    expected = log_ratios(model, some_tokens(), site)[slice(None) if layers is None else layers]
    term = penalty_of(model, some_tokens(), regularizer)
    assert term.item() == pytest.approx(-0.5 * expected.sum().item(), rel=1e-5)


def test_both_ffns_of_a_mixer_are_in_it() -> None:
    model = Mixer(MixerConfig(2, 6, 2, image_size=4, n_channels=1, n_classes=3, init_std=0.4))
    images = torch.randn(9, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = log_ratios(model, images, "post")
    assert len(expected) == 4
    term = penalty_of(model, images, Regularizer("participation_ratio", 2))
    assert term.item() == pytest.approx(2 * expected.sum().item(), rel=1e-5)


@pytest.mark.parametrize("site", ["pre", "post"])
@pytest.mark.parametrize("weight", [-1.0, 1.0])
def test_a_weight_below_0_raises_pr_in_every_layer_and_one_above_lowers_it(
    weight: float, site: str
) -> None:
    model = GPT(TINY)
    before = log_ratios(model, some_tokens(), site)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    penalty = Penalty(model, Regularizer("participation_ratio", weight, site))
    for _ in range(5):
        penalty.start()
        model(some_tokens())
        optimizer.zero_grad()
        penalty.finish().backward()
        optimizer.step()
    change = log_ratios(model, some_tokens(), site) - before
    assert (weight * change < 0).all()


def test_a_dead_layer_adds_nothing_and_its_gradient_is_0_never_nan() -> None:
    model = GPT(replace(TINY, activation=Activation("relu")))
    with torch.no_grad():
        model.blocks[1].ffn.up.bias.fill_(-1e3)
    others = log_ratios(model, some_tokens(), "post")[[0, 2]]
    term = penalty_of(model, some_tokens(), Regularizer("participation_ratio", 1.0))
    assert term.item() == pytest.approx(others.sum().item(), rel=1e-5)
    term.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not model.blocks[1].ffn.up.weight.grad.any()


def test_outside_of_a_training_step_nothing_is_taken() -> None:
    model = GPT(TINY)
    Penalty(model, Regularizer("participation_ratio", 1.0, n_tokens=2))
    torch.testing.assert_close(model(some_tokens()), PLAIN(some_tokens()), rtol=0, atol=0)
    assert model(some_tokens()).grad_fn is not None  # else nothing could be taken


def test_a_forward_pass_that_was_cut_off_leaves_nothing_behind() -> None:
    model = GPT(TINY)
    penalty = Penalty(model, Regularizer("participation_ratio", 1.0))
    expected = log_ratios(model, some_tokens(), "post").sum().item()
    penalty.start()
    model(some_tokens())  # and an error before the loss
    penalty.start()
    model(some_tokens())
    assert penalty.finish().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "pr"}, r"regularizer\.name must be one of none, participation_ratio; got 'pr'"),
        ({"site": "input"}, r"regularizer\.site must be one of pre, post; got 'input'"),
        ({"weight": 0.1}, r"regularizer\.weight=0\.1 has no effect with regularizer\.name=none"),
        ({"n_tokens": 1}, r"regularizer\.n_tokens must be at least 2.*got 1"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Regularizer(**values)


@pytest.mark.parametrize("layers", [[], [0, 3], ["0"]])
def test_layers_that_the_network_does_not_have_are_refused(layers: list) -> None:
    regularizer = Regularizer("participation_ratio", 1.0, layers=layers)
    with pytest.raises(ConfigError, match=r"regularizer\.layers must be null .* which are 0, 1, 2"):
        regularizer.ffns(PLAIN)
