"""`model.pre_std`: the pre-activations after the scaling, and what the scaling leaves unchanged."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nerve.errors import ConfigError
from nerve.models import scale_pre
from nerve.models.gpt import GPT, GPTConfig
from nerve.models.mixer import Mixer, MixerConfig
from nerve.nn.activation import Activation
from nerve.nn.ffn import FeedForward, FFNDesign
from nerve.nn.normalization import Normalization
from nerve.nn.position import Position

TINY = GPTConfig(
    n_layers=3, d_model=8, n_heads=2, seq_len=6, vocab_size=11, position=Position("none")
)
DESIGNS = {
    "preln": TINY,
    "normfree": replace(TINY, normalization=Normalization(kind="none")),
    "gated": replace(TINY, activation=Activation("silu"), ffn=FFNDesign(gated=True, bias=False)),
}


def some_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(TINY.vocab_size, (7, TINY.seq_len), generator=generator)


def standardized(x: Tensor) -> Tensor:
    """A newly built LayerNorm, written out."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def by_hand(model: GPT, tokens: Tensor, std: float) -> dict[str, float]:
    """The factors from a forward pass in float64, written out with copies of the initial
    weights."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    norm: Callable[[Tensor], Tensor] = (
        (lambda x: x) if model.config.normalization.kind == "none" else standardized
    )
    act = {"gelu": F.gelu, "silu": F.silu}[model.config.activation.name]
    x = weights["embedding.weight"][tokens]
    n_heads, (_, seq, d) = model.config.n_heads, x.shape
    factors = {}
    for layer in range(model.config.n_layers):
        own = {
            name.removeprefix(f"blocks.{layer}."): value
            for name, value in weights.items()
            if name.startswith(f"blocks.{layer}.")
        }
        projected = norm(x) @ own["attention.qkv.weight"].T
        q, k, v = (
            part.unflatten(-1, (n_heads, d // n_heads)).transpose(1, 2)
            for part in projected.chunk(3, dim=-1)
        )
        scores = q @ k.mT / (d // n_heads) ** 0.5
        causal = torch.ones(seq, seq).tril().bool()
        mixed = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v
        x = x + mixed.transpose(1, 2).flatten(2) @ own["attention.out.weight"].T
        h = norm(x)
        gated = "ffn.gate.weight" in own
        before = own["ffn.gate.weight" if gated else "ffn.up.weight"]
        u = (h @ before.T).flatten(0, 1)
        centered = u - u.mean(0)
        covariance = centered.T @ centered / (len(u) - 1)
        factor = std / float((covariance.trace() / len(covariance)).sqrt())
        factors[f"ffn/{layer:02d}"] = factor
        hidden = act(h @ before.T * factor)
        if gated:
            hidden = hidden * (h @ own["ffn.up.weight"].T)
        x = x + hidden @ own["ffn.down.weight"].T
    return factors


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("std", [0.05, 1.0])
def test_the_factors_are_those_of_a_forward_pass_by_hand(design: str, std: float) -> None:
    """Each layer sees the scaled weights of those before it."""
    model = GPT(replace(DESIGNS[design], init_std=0.3), seed=1)
    expected = by_hand(model, some_tokens(), std)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    factors = scale_pre(model, some_tokens(), std)
    assert factors == pytest.approx(expected, rel=1e-5)
    if design == "normfree":  # else a factor does not depend on those before it so much
        assert len({round(factor, 3) for factor in factors.values()}) == 3
    weight = "gate" if design == "gated" else "up"
    for name, value in model.state_dict().items():
        layer = name.split(".")[1].zfill(2)
        scaled = name.endswith(f"ffn.{weight}.weight")
        factor = factors[f"ffn/{layer}"] if scaled else 1.0
        torch.testing.assert_close(value, before[name] * factor, rtol=1e-6, atol=0)


def sizes(model: torch.nn.Module, inputs: Tensor) -> list[float]:
    """SD(u) of every FFN in a forward pass."""
    found = []
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.pre.register_forward_hook(
                lambda linear, arguments, u: found.append(
                    float(u.detach().double().flatten(0, -2).var(0).mean().sqrt())
                )
            )
    model(inputs)
    return found


def test_after_it_all_pre_activations_have_the_size_and_a_second_time_changes_nothing() -> None:
    model = GPT(DESIGNS["normfree"])
    scale_pre(model, some_tokens(), 0.7)
    assert sizes(model, some_tokens()) == pytest.approx([0.7] * 3, rel=1e-5)
    again = scale_pre(model, some_tokens(), 0.7)
    assert list(again.values()) == pytest.approx([1.0] * 3, rel=1e-5)


def test_both_ffns_of_a_mixer_are_scaled() -> None:
    model = Mixer(MixerConfig(2, 6, 2, image_size=4, n_channels=1, n_classes=3))
    images = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    factors = scale_pre(model, images, 0.5)
    names = ["token_mixing/00", "channel_mixing/00", "token_mixing/01", "channel_mixing/01"]
    assert list(factors) == names
    assert sizes(model, images) == pytest.approx([0.5] * 4, rel=1e-5)


def test_modes_hooks_and_the_random_state_are_as_before_and_dropout_is_off() -> None:
    factors = []
    for dropout in (0.0, 0.9):
        model = GPT(replace(TINY, dropout=dropout))
        state = torch.get_rng_state()
        factors.append(scale_pre(model, some_tokens(), 1.0))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(module.training for module in model.modules())
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert factors[0] == factors[1]


def test_the_head_is_not_run() -> None:
    """Its logits for a whole batch would be by far the largest tensor of the pass."""
    model = GPT(TINY)
    model.head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    assert len(scale_pre(model, some_tokens(), 1.0)) == 3


def test_pre_activations_without_variance_are_refused() -> None:
    model = GPT(DESIGNS["normfree"])
    with torch.no_grad():
        model.blocks[1].ffn.up.weight.zero_()
    with pytest.raises(ConfigError, match=r"model\.pre_std=1\.0 .* of ffn/01 .* deviation of 0\.0"):
        scale_pre(model, some_tokens(), 1.0)
    assert not any(module._forward_pre_hooks for module in model.modules())
