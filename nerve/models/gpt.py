"""The decoder-only Transformer: GPT-2, LLaMA and designs in between, set by its factors."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nerve.config import require, require_count
from nerve.errors import ConfigError
from nerve.models.initialization import check_initial, initialize
from nerve.nn.activation import Activation
from nerve.nn.constraint import iterate_together
from nerve.nn.ffn import FeedForward, FFNDesign
from nerve.nn.normalization import WIRINGS, Normalization, Residual
from nerve.nn.position import AttentionPosition, Position


@dataclass(frozen=True)
class GPTConfig:
    """The design of a GPT, without its weights.

    Attributes:
        n_layers, d_model, n_heads: depth, width of the residual stream, attention heads.
        seq_len: the longest sequence.
        vocab_size: number of tokens of the embedding and the head.
        dropout: on the embeddings, the attention weights and each sublayer's output, in [0, 1).
        tie_embeddings: whether the head uses the embedding matrix.
        attention_bias: whether the attention's projections add a bias.
        init_std: standard deviation of the initial weights.
        scale_residual_init: whether to divide it by √(2 n_layers) for the matrices that write into
            the residual stream (Radford et al. 2019).
        pre_std: standard deviation to which `scale_pre` scales the pre-activations before training;
            None leaves them unscaled.
        normalization, activation, position, ffn: the design factors.

    Raises:
        ConfigError: for a value out of range, or values that contradict each other.
    """

    n_layers: int
    d_model: int
    n_heads: int
    seq_len: int
    vocab_size: int
    dropout: float = 0.0
    tie_embeddings: bool = True
    attention_bias: bool = True
    init_std: float = 0.02
    scale_residual_init: bool = True
    pre_std: int | float | None = None
    normalization: Normalization = field(default_factory=Normalization)
    activation: Activation = field(default_factory=Activation)
    position: Position = field(default_factory=Position)
    ffn: FFNDesign = field(default_factory=FFNDesign)

    FFNS: ClassVar = ("ffn",)
    """The names of the FFNs of each block."""

    def __post_init__(self) -> None:
        sizes = ("model.n_layers", "model.d_model", "model.n_heads", "model.seq_len")
        for key in (*sizes, "data.vocab_size"):
            require_count(key, getattr(self, key.split(".")[1]))
        require(
            self.d_model % self.n_heads == 0,
            "model.d_model must be a multiple of model.n_heads; "
            f"got model.d_model={self.d_model} and model.n_heads={self.n_heads}.",
        )
        require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1); got {self.dropout}.")
        check_initial(self.init_std, self.pre_std, self.ffn)
        self.normalization.placements(self.n_layers)

    def ffn_widths(self, name: str) -> tuple[int, int]:
        """d_in and d_ff of the FFN `name`, one of `FFNS`.

        Raises:
            ConfigError: if the width times `d_model` is not an integer.
        """
        return self.d_model, self.ffn.hidden_width(self.d_model)


class CausalSelfAttention(nn.Module):
    """softmax(q kᵀ / √d_head + bias) v for each head, where every token attends to itself and its
    past.

    Args:
        d_model: width of the residual stream.
        n_heads: number of heads, with d_head = d_model / n_heads features each; divides d_model.
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


class GPTBlock(nn.Module):
    """Causal self-attention and a feed-forward network on the residual stream."""

    def __init__(
        self,
        config: GPTConfig,
        layer: int,
        placement: str,
        act: nn.Module,
        position: AttentionPosition,
    ) -> None:
        super().__init__()
        d_model = config.d_model
        self.attention_norm = config.normalization.build(d_model)
        self.attention = CausalSelfAttention(
            d_model,
            config.n_heads,
            position,
            bias=config.attention_bias,
            dropout=config.dropout,
        )
        wire_attention, wire_ffn = WIRINGS[placement]
        self.wire_attention, self.wire_ffn = wire_attention, Residual(wire_ffn)
        self.ffn_norm = config.normalization.build(d_model)
        self.ffn = FeedForward(
            *config.ffn_widths("ffn"),
            act,
            gated=config.ffn.gated,
            bias=config.ffn.bias,
            constraint=config.ffn.constraint,
            dropout=config.dropout,
            layer=layer,
            stream=self.wire_ffn,
        )

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        x = self.wire_attention(x, self.attention_norm, self.attention)
        return self.wire_ffn(x, self.ffn_norm, self.ffn)


class GPT(nn.Module):
    """A decoder-only Transformer (Radford et al. 2019), tokens to logits.

    Args:
        config: the design.
        seed: determines the initial weights, together with the name of each matrix; the global
            random state is neither read nor changed.

    Raises:
        ConfigError: if values of the configuration contradict each other.
    """

    Config: ClassVar = GPTConfig
    DATA_DIMS: ClassVar = ("vocab_size",)
    """The fields of `Config` that come from the data."""

    # Layers draw weights from the global generator when they are built; `initialize` replaces them.
    @torch.random.fork_rng(devices=[])
    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        n_layers, d_model = config.n_layers, config.d_model
        table = torch.empty(config.vocab_size, d_model)  # not drawn here, because it is slow
        self.embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.position = config.position.at_input(config.seq_len, d_model)
        self.dropout = nn.Dropout(config.dropout)
        in_attention = config.position.in_attention(
            config.seq_len, d_model // config.n_heads, config.n_heads
        )
        placements = config.normalization.placements(n_layers)
        acts = config.activation.build(n_layers)
        self.blocks = nn.ModuleList(
            GPTBlock(config, layer, placements[layer], acts[layer], in_attention)
            for layer in range(n_layers)
        )
        self.norm = config.normalization.build_final(d_model)
        tied = "meta" if config.tie_embeddings else None  # no separate weight
        self.head = nn.Linear(d_model, config.vocab_size, bias=False, device=tied)
        initialize(
            self,
            seed=seed,
            std=config.init_std,
            residual_outputs=list(self._residual_outputs()),
            residual_scale=(2 * n_layers) ** -0.5 if config.scale_residual_init else 1.0,
        )
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        iterate_together(self)

    def _residual_outputs(self) -> Iterator[nn.Linear]:
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                yield module.out
            elif isinstance(module, FeedForward):
                yield module.down

    def forward(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at each position.

        Raises:
            ConfigError: for a sequence longer than `seq_len`.
        """
        if tokens.shape[1] > self.config.seq_len:
            raise ConfigError(
                "A sequence must not be longer than "
                f"model.seq_len={self.config.seq_len}; got one of {tokens.shape[1]} tokens. Raise "
                "model.seq_len or shorten the sequences."
            )
        x = self.dropout(self.position(self.embedding(tokens)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
