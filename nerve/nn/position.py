"""The position factor: how the network represents the order of its tokens.

An encoding acts in one of two places: on the embeddings at the input (`learned`, `sinusoidal`), or
within every attention layer (`rope` on queries and keys, `alibi` on the scores).
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nerve.config import require, require_choice

Heads = Float[Tensor, "batch n_heads seq d_head"]


class LearnedPosition(nn.Module):
    """Adds a trained vector for each position to the embeddings (Radford et al. 2019, GPT-2)."""

    def __init__(self, seq_len: int, d_model: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(seq_len, d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return x + self.embedding.weight[: x.shape[1]]


class SinusoidalPosition(nn.Module):
    """Adds sin(t / 10000^(2i/d)) at feature 2i and its cosine at 2i + 1 (Vaswani et al. 2017).

    As in that paper, embeddings are first multiplied by √d_model; otherwise their initial values
    would be negligible compared with waves of amplitude 1.
    """

    table: Tensor

    def __init__(self, seq_len: int, d_model: int) -> None:
        super().__init__()
        require(
            d_model % 2 == 0,
            "position.name=sinusoidal pairs features, so model.d_model must be even; "
            f"got {d_model}.",
        )
        angles = _angles(seq_len, d_model, theta=10_000.0)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return x * x.shape[-1] ** 0.5 + self.table[: x.shape[1]].to(x.dtype)


class AttentionPosition(nn.Module):
    """The encoding that all attention layers share; this base class encodes no positions."""

    def rotate(self, queries: Heads, keys: Heads) -> tuple[Heads, Heads]:
        """The queries and keys from which the scores are computed."""
        return queries, keys

    def bias(self, seq_len: int) -> Float[Tensor, "1 n_heads seq seq"] | None:
        """The bias added to the scores, -inf where a key is in the future; None for no bias."""
        return None


class RotaryPosition(AttentionPosition):
    """Rotates each query and key by its position, so that scores only depend on distances.

    Feature i is paired with feature i + d_head/2, and the pair is rotated by the angle
    t · theta^(-2i/d_head) (Su et al. 2021, equation 15; the pairing of GPT-NeoX and LLaMA).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, seq_len: int, d_head: int, theta: float) -> None:
        super().__init__()
        require(
            d_head % 2 == 0,
            "position.name=rope pairs features, so model.d_model / model.n_heads must be even; "
            f"got {d_head}.",
        )
        angles = _angles(seq_len, d_head, theta)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, queries: Heads, keys: Heads) -> tuple[Heads, Heads]:
        return self._turned(queries), self._turned(keys)

    def _turned(self, x: Heads) -> Heads:
        seq = x.shape[-2]
        cos, sin = self.cos[:seq], self.sin[:seq]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x.dtype)


class ALiBi(AttentionPosition):
    """Subtracts slope · distance from the scores, with one slope per head (Press et al. 2022)."""

    scores: Tensor

    def __init__(self, seq_len: int, n_heads: int) -> None:
        super().__init__()
        steps = torch.arange(seq_len)
        distances = (steps[:, None] - steps[None, :]).float()
        scores = -alibi_slopes(n_heads).float()[None, :, None, None] * distances
        scores = scores.masked_fill(distances < 0, -math.inf)
        self.register_buffer("scores", scores, persistent=False)

    def bias(self, seq_len: int) -> Float[Tensor, "1 n_heads seq seq"] | None:
        return self.scores[..., :seq_len, :seq_len]


def alibi_slopes(n_heads: int) -> Float[Tensor, " n_heads"]:
    """2^(-8h/n) for head h = 1 … n, if n is a power of two; float64.

    For other numbers of heads, the first heads have the slopes of the next lower power of two, n,
    and the remaining heads have every other slope of 2n, starting with the first (the rule of the
    ALiBi authors).
    """
    lower = 2 ** int(math.log2(n_heads))
    whole = torch.arange(1, lower + 1, dtype=torch.float64)
    between = torch.arange(n_heads - lower, dtype=torch.float64) + 0.5
    return torch.exp2(-8 * torch.cat([whole, between]) / lower)


def _angles(seq_len: int, d: int, theta: float) -> Float[Tensor, "seq half"]:
    """Position t times the frequency theta^(-2i/d) of pair i."""
    frequencies = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    return torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies).float()


POSITIONS: dict[str, type[nn.Module]] = {
    "learned": LearnedPosition,
    "rope": RotaryPosition,
    "sinusoidal": SinusoidalPosition,
    "alibi": ALiBi,
    "none": AttentionPosition,
}


@dataclass(frozen=True)
class Position:
    """How positions enter the network.

    Attributes:
        name: a key of `POSITIONS`; with `none` a decoder has only the causal mask.
        theta: the base of RoPE's frequencies.

    Raises:
        ConfigError: for an unknown name, or a theta that has no effect.
    """

    name: str = "learned"
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        require_choice("position.name", self.name, POSITIONS)
        require(self.theta > 1, f"position.theta must be above 1; got {self.theta}.")
        require(
            self.name == "rope" or self.theta == Position.theta,
            f"position.theta={self.theta} has no effect with position.name={self.name}. "
            "Use position.name=rope.",
        )

    def at_input(self, seq_len: int, d_model: int) -> nn.Module:
        """The module applied to the embeddings [batch, seq, d_model]."""
        encoding = POSITIONS[self.name]
        if issubclass(encoding, AttentionPosition):
            return nn.Identity()
        return encoding(seq_len, d_model)

    def in_attention(self, seq_len: int, d_head: int, n_heads: int) -> AttentionPosition:
        """The module that all attention layers share; it has no parameters."""
        if self.name == "rope":
            return RotaryPosition(seq_len, d_head, self.theta)
        return ALiBi(seq_len, n_heads) if self.name == "alibi" else AttentionPosition()
