"""Causal multi-head self-attention."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nerve.nn.position import AttentionPosition


class CausalSelfAttention(nn.Module):
    """softmax(q kᵀ / √d_head + bias) v for each head, every token seeing itself and its past.

    Args:
        d_model: width of the stream.
        n_heads: heads of d_head = d_model / n_heads features each; divides d_model.
        bias: whether the two projections add a bias.
        dropout: on the attention weights and on the output, in training.
        position: shared by all layers; rotates q and k, or biases the scores.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        position: AttentionPosition,
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.position = position
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.out = nn.Linear(d_model, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        batch, seq, d_model = x.shape
        heads = self.qkv(x).view(batch, seq, 3, self.n_heads, d_model // self.n_heads)
        queries, keys, values = heads.transpose(1, 3).unbind(2)
        queries, keys = self.position.rotate(queries, keys)
        bias = self.position.bias(seq)
        mixed = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=None if bias is None else bias.to(queries.dtype),
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=bias is None,
        )
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, seq, d_model)))
