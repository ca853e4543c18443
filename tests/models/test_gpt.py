"""The GPT: causality, wiring, factors in every combination, and invalid combinations."""

from dataclasses import replace
from itertools import combinations, product
from operator import itemgetter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nerve.errors import ConfigError
from nerve.models.gpt import GPT, GPTConfig
from nerve.nn.activation import ACTIVATIONS, Activation
from nerve.nn.constraint import CONSTRAINTS
from nerve.nn.ffn import FFNDesign
from nerve.nn.normalization import Normalization
from nerve.nn.position import POSITIONS, Position

TINY = GPTConfig(n_layers=2, d_model=8, n_heads=2, seq_len=6, vocab_size=11)

NORMALIZATIONS = [
    Normalization(kind="none"),
    *(
        Normalization(kind=kind, placement=placement, n_post_layers=int(placement == "mix"))
        for kind in ("layernorm", "rmsnorm")
        for placement in ("pre", "post", "mix", "pre_residual_after_norm")
    ),
]


def some_tokens(config: GPTConfig = TINY, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, config.seq_len), generator=generator)


@pytest.mark.parametrize("position", POSITIONS)
def test_logits_depend_on_the_past_and_the_present_alone(position: str) -> None:
    """Gradients of the logits at t with respect to the embeddings are exactly 0 after t, but not at
    t."""
    model = GPT(replace(TINY, position=Position(position), init_std=0.5))
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(
        lambda module, args, output: (
            embedded.append(output.detach().requires_grad_()) or embedded[0]
        )
    )
    logits = model(some_tokens(batch=1))
    for t in range(TINY.seq_len):
        (gradient,) = torch.autograd.grad(
            logits[0, t].square().sum(), embedded[0], retain_graph=True
        )
        seen = gradient[0].norm(dim=-1)
        assert (seen[: t + 1] > 0).all()
        assert not seen[t + 1 :].any()


@pytest.mark.parametrize(
    "normalization", NORMALIZATIONS, ids=lambda norm: f"{norm.kind}-{norm.placement}"
)
def test_blocks_are_wired_as_the_placement_says(normalization: Normalization) -> None:
    """Against the four wirings written out on the stream."""
    model = GPT(replace(TINY, normalization=normalization, init_std=0.3))
    tokens = some_tokens()
    x = model.embedding(tokens) + model.position.embedding.weight
    for layer, block in enumerate(model.blocks):
        n1, attention, n2, ffn = block.attention_norm, block.attention, block.ffn_norm, block.ffn
        placement = normalization.placement
        if placement == "post" or (placement == "mix" and layer == 0):
            x = n1(x + attention(x))
            x = n2(x + ffn(x))
        elif placement == "pre_residual_after_norm":
            h = n1(x)
            x = h + attention(h)
            x = x + ffn(n2(x))
        else:
            x = x + attention(n1(x))
            x = x + ffn(n2(x))
    expected = model.norm(x) @ model.embedding.weight.T
    torch.testing.assert_close(model(tokens), expected)


def test_with_silent_sublayers_preln_is_the_identity() -> None:
    model = GPT(TINY)
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.attention.out, block.ffn.down):
                linear.weight.zero_()
                linear.bias.zero_()
    tokens = some_tokens()
    stream = model.embedding(tokens) + model.position.embedding.weight
    assert torch.equal(model(tokens), model.head(model.norm(stream)))


def test_without_positions_one_layer_sees_the_past_as_a_set() -> None:
    tokens = some_tokens(batch=1)
    shuffled = tokens[:, [3, 1, 4, 0, 2, 5]]
    assert not torch.equal(tokens, shuffled)
    for position in POSITIONS:
        model = GPT(replace(TINY, n_layers=1, position=Position(position), init_std=0.5))
        last, last_shuffled = model(tokens)[0, -1], model(shuffled)[0, -1]
        assert torch.allclose(last, last_shuffled, atol=1e-5) == (position == "none")


COMBINATIONS = [*product(NORMALIZATIONS, ACTIVATIONS, POSITIONS, (False, True))]
WITH_ALL_PAIRS = [
    (normalization, activation, [*POSITIONS][(i + j + 2 * gated) % len(POSITIONS)], gated)
    for i, normalization in enumerate(NORMALIZATIONS)
    for j, activation in enumerate(ACTIVATIONS)
    for gated in (False, True)
]
"""A fifth of them, with each pair of values of any two factors."""


def test_a_fifth_of_the_combinations_has_each_pair() -> None:
    for pair in combinations(range(4), 2):
        of_all, of_some = (
            {itemgetter(*pair)(each) for each in some} for some in (COMBINATIONS, WITH_ALL_PAIRS)
        )
        assert of_some == of_all
    assert 5 * len(set(WITH_ALL_PAIRS)) == len(COMBINATIONS)


@pytest.mark.parametrize(
    "chosen", [WITH_ALL_PAIRS, pytest.param(COMBINATIONS, marks=pytest.mark.slow)], ids=len
)
def test_combinations_of_factors_train(chosen: list[tuple[Normalization, str, str, bool]]) -> None:
    """Forward and backward: finite, and a gradient for every parameter."""
    tokens = some_tokens(batch=2)
    for normalization, activation, position, gated in chosen:
        model = GPT(
            replace(
                TINY,
                normalization=normalization,
                activation=Activation(activation),
                position=Position(position),
                ffn=FFNDesign(width=2, gated=gated),
            )
        )
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        combination = (normalization, activation, position, gated)
        assert loss.isfinite(), combination
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, (combination, name)
            assert parameter.grad.isfinite().all(), (combination, name)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("gated", [False, True])
def test_a_saved_state_gives_the_same_network(constraint: str, gated: bool) -> None:
    config = replace(
        TINY,
        activation=Activation("learnable_leaky_relu", shared=True),
        ffn=FFNDesign(constraint=constraint, gated=gated),
    )
    saved, loaded = GPT(config, seed=0).eval(), GPT(config, seed=1).eval()
    tokens = some_tokens()
    assert not torch.allclose(saved(tokens), loaded(tokens))
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(saved(tokens), loaded(tokens))


def test_tied_embeddings_are_one_tensor_and_untied_two() -> None:
    tied, untied = GPT(TINY), GPT(replace(TINY, tie_embeddings=False))
    assert tied.head.weight is tied.embedding.weight
    assert "head.weight" not in dict(tied.named_parameters())
    assert torch.equal(tied.embedding.weight, untied.embedding.weight)
    assert not torch.equal(untied.head.weight, untied.embedding.weight)


def test_a_shared_slope_appears_once_among_the_parameters() -> None:
    for shared, names in (
        (True, ["blocks.0.ffn.act.slope"]),
        (False, ["blocks.0.ffn.act.slope", "blocks.1.ffn.act.slope"]),
    ):
        model = GPT(replace(TINY, activation=Activation("learnable_leaky_relu", shared=shared)))
        assert [name for name, _ in model.named_parameters() if "slope" in name] == names


def test_residual_outputs_start_smaller_by_the_root_of_twice_the_depth() -> None:
    config = replace(TINY, n_layers=8)
    scaled, plain = GPT(config), GPT(replace(config, scale_residual_init=False))
    for (name, parameter), reference in zip(
        scaled.named_parameters(), plain.parameters(), strict=True
    ):
        scale = 0.25 if name.endswith(("attention.out.weight", "ffn.down.weight")) else 1
        torch.testing.assert_close(parameter, scale * reference)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_initial_weights_come_from_the_seed_alone(constraint: str) -> None:
    """Whatever the global random state is, which does not change."""
    config = replace(TINY, ffn=FFNDesign(constraint=constraint, gated=True))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = GPT(config, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = GPT(config, seed=5), GPT(config, seed=6)
    for (name, value), again in zip(
        first.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(value, again), name
    assert not torch.equal(first.head.weight, other.head.weight)


def test_factors_leave_the_initial_weights_of_shared_layers_alone() -> None:
    plain = GPT(TINY).state_dict()
    changed = GPT(
        replace(
            TINY,
            n_layers=3,
            scale_residual_init=True,
            normalization=Normalization(kind="none"),
            activation=Activation("learnable_leaky_relu"),
            position=Position("rope"),
            ffn=FFNDesign(gated=True),
        )
    ).state_dict()
    for name in ("embedding.weight", "blocks.1.attention.qkv.weight", "blocks.1.ffn.up.weight"):
        assert torch.equal(plain[name], changed[name])


def test_spectral_norm_holds_while_a_gpt_trains() -> None:
    """20 AdamW steps at lr 3e-3 from the start: σ is within 5% in every forward pass, 1e-4 at the
    end."""
    config = GPTConfig(
        n_layers=2,
        d_model=128,
        n_heads=4,
        seq_len=32,
        vocab_size=256,
        ffn=FFNDesign(constraint="spectral_norm"),
    )
    model = GPT(config)
    matrices = [matrix for block in model.blocks for matrix in (block.ffn.up, block.ffn.down)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(21):
        tokens = torch.randint(256, (8, 33), generator=generator)
        logits = model(tokens[:, :-1])
        model.eval()  # so that looking at the weights does not iterate
        for matrix in matrices:
            largest = torch.linalg.matrix_norm(matrix.weight.detach(), 2).item()
            assert largest == pytest.approx(1, abs={0: 1e-5, 20: 1e-4}.get(step, 0.05))
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = GPT(replace(TINY, dropout=0.5)), some_tokens()
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), GPT(TINY)(tokens))


def test_shorter_sequences_are_taken_and_longer_ones_refused() -> None:
    model = GPT(TINY)
    tokens = some_tokens()
    torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4])
    with pytest.raises(ConfigError, match=r"model\.seq_len=6; .*7 tokens"):
        model(torch.zeros(1, 7, dtype=torch.long))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_heads": 3}, r"model\.d_model=8 and model\.n_heads=3"),
        ({"n_layers": 0}, r"model\.n_layers must be a whole number of at least 1"),
        ({"d_model": -8}, r"model\.d_model must be a whole number"),
        ({"vocab_size": 0}, r"data\.vocab_size must be a whole number of at least 1"),
        ({"dropout": 1.0}, r"model\.dropout must lie in \[0, 1\)"),
        ({"init_std": 0.0}, r"model\.init_std must be positive"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"normalization": Normalization(placement="mix", n_post_layers=2)},
            r"normalization\.n_post_layers .*model\.n_layers=2",
        ),
        ({"n_heads": 8, "position": Position("rope")}, r"position\.name=rope .*model\.n_heads"),
        ({"ffn": FFNDesign(width="8/3")}, r"ffn\.width=8/3 and model\.d_model=8"),
    ],
)
def test_combinations_that_cannot_be_built_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPT(replace(TINY, **values))
