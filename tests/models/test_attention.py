"""Causal self-attention against an implementation with an explicit softmax."""

import math

import pytest
import torch

from nerve.models.gpt import CausalSelfAttention
from nerve.nn.position import Position

BATCH, SEQ, D_MODEL, N_HEADS = 2, 7, 12, 3


def written_out(attention: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention by loops over the batch and the heads."""
    d_head = D_MODEL // N_HEADS
    queries, keys, values = attention.qkv(x).split(D_MODEL, dim=-1)
    out = torch.empty_like(x)
    bias = attention.position.bias(SEQ)
    for row in range(BATCH):
        for head in range(N_HEADS):
            at = slice(head * d_head, (head + 1) * d_head)
            q, k = attention.position.rotate(
                queries[None, None, row, :, at], keys[None, None, row, :, at]
            )
            scores = (q @ k.transpose(-1, -2))[0, 0] / math.sqrt(d_head)
            if bias is not None:
                scores = scores + bias[0, head]
            future = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).softmax(-1)
            out[row, :, at] = weights @ values[row, :, at]
    return attention.out(out)


@pytest.mark.parametrize("name", ["none", "rope", "alibi"])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_is_a_causal_softmax_over_scaled_scores(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    position = Position(name).in_attention(SEQ + 2, D_MODEL // N_HEADS, N_HEADS)
    attention = CausalSelfAttention(D_MODEL, N_HEADS, position, bias=bias).double()
    x = torch.randn(BATCH, SEQ, D_MODEL, dtype=torch.float64)
    torch.testing.assert_close(attention(x), written_out(attention, x))
    assert len(list(attention.parameters())) == (4 if bias else 2)


def test_dropout_acts_in_training_alone() -> None:
    torch.manual_seed(0)
    position = Position("none").in_attention(SEQ, D_MODEL // N_HEADS, N_HEADS)
    attention = CausalSelfAttention(D_MODEL, N_HEADS, position, dropout=0.5)
    x = torch.randn(BATCH, SEQ, D_MODEL)
    assert not torch.equal(attention(x), attention(x))
    attention.eval()
    assert torch.equal(attention(x), attention(x))
    torch.testing.assert_close(attention(x), written_out(attention, x))
