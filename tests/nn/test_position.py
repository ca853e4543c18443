"""The position factor against formulas written out by hand, and where each encoding acts."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nerve.errors import ConfigError
from nerve.nn.position import (
    POSITIONS,
    ALiBi,
    AttentionPosition,
    LearnedPosition,
    Position,
    RotaryPosition,
    SinusoidalPosition,
    alibi_slopes,
)


def test_learned_adds_the_vector_of_each_position() -> None:
    position = LearnedPosition(seq_len=6, d_model=4)
    added = position(torch.zeros(2, 5, 4))
    for row in added:
        assert torch.equal(row, position.embedding.weight[:5])


def test_sinusoidal_follows_its_formula() -> None:
    added = SinusoidalPosition(seq_len=50, d_model=6)(torch.zeros(1, 40, 6))[0]
    for t in (0, 1, 7, 39):
        for i in range(3):
            angle = t / 10_000 ** (2 * i / 6)
            assert added[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert added[t, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_waves_do_not_drown_the_embeddings() -> None:
    position, x = SinusoidalPosition(seq_len=8, d_model=6), torch.randn(1, 8, 6)
    torch.testing.assert_close(position(x) - position(torch.zeros(1, 8, 6)), x * math.sqrt(6))


def test_rope_is_the_multiplication_of_feature_pairs_by_a_phase() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, 3, 20, 8, generator=generator)
    position = RotaryPosition(seq_len=32, d_head=8, theta=500.0)
    for given, turned in zip((queries, keys), position.rotate(queries, keys), strict=True):
        x = given.double().numpy()
        phase = np.exp(1j * np.arange(20)[:, None] * 500.0 ** (-2 * np.arange(4) / 8))
        expected = (x[..., :4] + 1j * x[..., 4:]) * phase
        np.testing.assert_allclose(turned[..., :4].numpy(), expected.real, atol=1e-5)
        np.testing.assert_allclose(turned[..., 4:].numpy(), expected.imag, atol=1e-5)


def test_rope_scores_depend_on_the_distance_alone() -> None:
    """The same query and key at all positions: the scores are constant along each diagonal."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 16, generator=generator).double()
    queries, keys = RotaryPosition(seq_len=24, d_head=16, theta=10_000.0).rotate(
        query.expand(1, 1, 24, 16), key.expand(1, 1, 24, 16)
    )
    scores = (queries @ keys.transpose(-1, -2))[0, 0]
    for distance in range(24):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
    assert scores[:, 0].std() > 0.1, "yet they do depend on it"


def test_rope_keeps_the_dtype_of_its_input() -> None:
    x = torch.randn(1, 2, 4, 8).bfloat16()
    turned, _ = RotaryPosition(seq_len=4, d_head=8, theta=10_000.0).rotate(x, x)
    assert turned.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("n_heads", "exponents"),
    [
        (1, [8]),
        (4, [2, 4, 6, 8]),
        (8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (6, [2, 4, 6, 8, 1, 3]),
        (12, [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]),
    ],
)
def test_alibi_slopes_of_any_head_count(n_heads: int, exponents: list[float]) -> None:
    assert alibi_slopes(n_heads).tolist() == [2.0**-exponent for exponent in exponents]


def test_alibi_lowers_scores_by_slope_times_distance_and_masks_the_future() -> None:
    bias = ALiBi(seq_len=10, n_heads=2).bias(7)
    assert bias is not None
    for head, slope in enumerate((2**-4, 2**-8)):
        for i in range(7):
            for j in range(7):
                expected = -slope * (i - j) if j <= i else -math.inf
                assert bias[0, head, i, j].item() == expected


def test_each_encoding_acts_at_one_place() -> None:
    for name in POSITIONS:
        position = Position(name)
        at_input = not isinstance(position.at_input(8, 16), nn.Identity)
        in_attention = type(position.in_attention(8, 4, 4)) is not AttentionPosition
        assert at_input == (name in ("learned", "sinusoidal"))
        assert in_attention == (name in ("rope", "alibi"))


def test_only_the_learned_encoding_is_saved() -> None:
    for name in POSITIONS:
        position = Position(name)
        saved = {
            **position.at_input(8, 16).state_dict(),
            **position.in_attention(8, 4, 4).state_dict(),
        }
        assert list(saved) == (["embedding.weight"] if name == "learned" else [])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "rotary"}, r"position\.name must be one of learned, rope"),
        ({"name": "rope", "theta": 1.0}, r"position\.theta must be above 1"),
        ({"name": "alibi", "theta": 500.0}, r"position\.theta=500\.0 .*position\.name=alibi"),
    ],
)
def test_bad_values_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Position(**values)


def test_odd_widths_cannot_be_paired() -> None:
    with pytest.raises(ConfigError, match=r"position\.name=rope .*model\.n_heads"):
        Position("rope").in_attention(8, 5, 2)
    with pytest.raises(ConfigError, match=r"position\.name=sinusoidal .*model\.d_model"):
        Position("sinusoidal").at_input(8, 5)
