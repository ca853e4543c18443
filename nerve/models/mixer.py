"""The MLP-Mixer: images as patches, mixed by FFNs over patches and over channels alternately."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nerve.config import require, require_choice, require_count
from nerve.models.initialization import check_initial, initialize
from nerve.nn.activation import ACTIVATIONS, Activation
from nerve.nn.constraint import iterate_together
from nerve.nn.ffn import FeedForward, FFNDesign, Width, check_width, hidden_width
from nerve.nn.normalization import WIRINGS, Normalization, Residual
from nerve.nn.position import Position


@dataclass(frozen=True)
class Mixing:
    """Settings in which one of a block's two FFNs differs from the factors `activation` and `ffn`.

    Attributes:
        activation: a key of `ACTIVATIONS`; None for that of the factor.
        width: d_ff / d_model, a number or a fraction; None for `d_ff` or that of the factor.
        d_ff: the hidden width itself, instead of `width`.
    """

    activation: str | None = None
    width: Width | None = None
    d_ff: int | None = None


@dataclass(frozen=True)
class MixerConfig:
    """The design of an MLP-Mixer, without its weights.

    Attributes:
        n_layers, d_model: depth, width of the residual stream (the paper's C).
        patch_size: edge of a patch in pixels; must divide `image_size`.
        image_size, n_channels: edge in pixels and number of channels of the square images.
        n_classes: number of logits.
        dropout: on each FFN's output, in [0, 1).
        init_std: standard deviation of the initial weights.
        pre_std: standard deviation to which `scale_pre` scales the pre-activations before training;
            None leaves them unscaled.
        normalization, activation, position, ffn: the design factors; position must be `none`.
        token_mixing, channel_mixing: differences from `activation` and `ffn`.

    Raises:
        ConfigError: for a value out of range, or values that contradict each other.
    """

    n_layers: int
    d_model: int
    patch_size: int
    image_size: int
    n_channels: int
    n_classes: int
    dropout: float = 0.0
    init_std: float = 0.02
    pre_std: int | float | None = None
    normalization: Normalization = field(default_factory=Normalization)
    activation: Activation = field(default_factory=Activation)
    position: Position = field(default_factory=lambda: Position("none"))
    ffn: FFNDesign = field(default_factory=FFNDesign)
    token_mixing: Mixing = field(default_factory=Mixing)
    channel_mixing: Mixing = field(default_factory=Mixing)

    FFNS: ClassVar = ("token_mixing", "channel_mixing")
    """The names of the FFNs of each block."""

    def __post_init__(self) -> None:
        sizes = ("model.n_layers", "model.d_model", "model.patch_size")
        for key in (*sizes, "data.image_size", "data.n_channels", "data.n_classes"):
            require_count(key, getattr(self, key.split(".")[1]))
        require(
            self.image_size % self.patch_size == 0,
            "data.image_size must be a multiple of model.patch_size; got "
            f"data.image_size={self.image_size} and model.patch_size={self.patch_size}.",
        )
        require(0 <= self.dropout < 1, f"model.dropout must lie in [0, 1); got {self.dropout}.")
        check_initial(self.init_std, self.pre_std, self.ffn)
        require(
            self.position.name == "none",
            f"model.kind=mixer takes no position encoding; got position.name={self.position.name}. "
            "Use position.name=none, because token mixing has separate weights for each patch.",
        )
        for group, mixing in (
            ("model.token_mixing", self.token_mixing),
            ("model.channel_mixing", self.channel_mixing),
        ):
            check_width(mixing.width, mixing.d_ff, group)
            if mixing.activation is not None:
                require_choice(f"{group}.activation", mixing.activation, ACTIVATIONS)
        self.normalization.placements(self.n_layers)

    @property
    def n_patches(self) -> int:
        """Number of patches of an image, which are the tokens."""
        return (self.image_size // self.patch_size) ** 2

    def activation_of(self, name: str) -> Activation:
        """The activation of `token_mixing` or `channel_mixing`: its own or that of the factor."""
        own = getattr(self, name).activation
        return self.activation if own in (None, self.activation.name) else Activation(own)

    def ffn_widths(self, name: str) -> tuple[int, int]:
        """d_in and d_ff of the FFN `name`, one of `FFNS`; d_ff is its own or that of the factor.

        Raises:
            ConfigError: if the width times `d_model` is not an integer.
        """
        d_in = self.n_patches if name == "token_mixing" else self.d_model
        own = getattr(self, name)
        if own.width is None and own.d_ff is None:
            return d_in, self.ffn.hidden_width(self.d_model)
        return d_in, hidden_width(own.width, own.d_ff, self.d_model, f"model.{name}")

    def build_ffn(self, name: str, layer: int, act: nn.Module, stream: nn.Module) -> FeedForward:
        """The `token_mixing` or `channel_mixing` FFN of block `layer`, with its residual stream."""
        return FeedForward(
            *self.ffn_widths(name),
            act,
            gated=self.ffn.gated,
            bias=self.ffn.bias,
            constraint=self.ffn.constraint,
            dropout=self.dropout,
            layer=layer,
            name=name,
            stream=stream,
        )


def patches(
    images: Float[Tensor, "batch n_channels height width"], size: int
) -> Float[Tensor, "batch n_patches n_pixels"]:
    """Squares of `size` × `size` pixels, row by row, each flattened channel by channel."""
    batch, n_channels, height, width = images.shape
    grid = images.reshape(batch, n_channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class MixerBlock(nn.Module):
    """A feed-forward network over the patches, then one over the channels."""

    def __init__(
        self,
        config: MixerConfig,
        layer: int,
        placement: str,
        token_act: nn.Module,
        channel_act: nn.Module,
    ) -> None:
        super().__init__()
        self.wire_tokens, self.wire_channels = map(Residual, WIRINGS[placement])
        self.token_norm = config.normalization.build(config.d_model)
        self.token_mixing = config.build_ffn("token_mixing", layer, token_act, self.wire_tokens)
        self.channel_norm = config.normalization.build(config.d_model)
        self.channel_mixing = config.build_ffn(
            "channel_mixing", layer, channel_act, self.wire_channels
        )

    def forward(
        self, x: Float[Tensor, "batch n_patches d_model"]
    ) -> Float[Tensor, "batch n_patches d_model"]:
        x = self.wire_tokens(x, self.token_norm, self._mix_tokens)
        return self.wire_channels(x, self.channel_norm, self.channel_mixing)

    def _mix_tokens(
        self, x: Float[Tensor, "batch n_patches d_model"]
    ) -> Float[Tensor, "batch n_patches d_model"]:
        return self.token_mixing(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021, equation 1), images to logits.

    With a shared learnable slope, all token-mixing FFNs share one slope, and all channel-mixing
    FFNs another.

    Args:
        config: the design.
        seed: determines the initial weights, together with the name of each matrix; the global
            random state is neither read nor changed.
    """

    Config: ClassVar = MixerConfig
    DATA_DIMS: ClassVar = ("image_size", "n_channels", "n_classes")
    """The fields of `Config` that come from the data."""

    # Layers draw weights from the global generator when they are built; `initialize` replaces them.
    @torch.random.fork_rng(devices=[])
    def __init__(self, config: MixerConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        n_layers, d_model = config.n_layers, config.d_model
        self.patch_embedding = nn.Linear(config.n_channels * config.patch_size**2, d_model)
        self.dropout = nn.Dropout(config.dropout)
        placements = config.normalization.placements(n_layers)
        token_acts = config.activation_of("token_mixing").build(n_layers)
        channel_acts = config.activation_of("channel_mixing").build(n_layers)
        self.blocks = nn.ModuleList(
            MixerBlock(config, layer, placements[layer], token_acts[layer], channel_acts[layer])
            for layer in range(n_layers)
        )
        self.norm = config.normalization.build_final(d_model)
        self.head = nn.Linear(d_model, config.n_classes)
        initialize(self, seed=seed, std=config.init_std)
        iterate_together(self)

    def forward(
        self, images: Float[Tensor, "batch n_channels height width"]
    ) -> Float[Tensor, "batch n_classes"]:
        """Class logits of each image.

        Raises:
            ConfigError: for images whose shape differs from the configuration.
        """
        config = self.config
        expected = (config.n_channels, config.image_size, config.image_size)
        require(
            tuple(images.shape[1:]) == expected,
            "Images must have the shape (data.n_channels, data.image_size, data.image_size) = "
            f"{expected}; got {tuple(images.shape[1:])}.",
        )
        x = self.dropout(self.patch_embedding(patches(images, config.patch_size)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))
