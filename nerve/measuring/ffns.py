"""What the measurement must know of a feed-forward network (FFN), and how a model's are found."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from nerve.errors import MeasurementError


@runtime_checkable
class FFN(Protocol):
    """What the measurement must know of an FFN: its place, and the modules around its nonlinearity.

    A module of a model fulfils it by having these attributes; for a model that has not, pass
    `FFNAdapter`s.
    """

    @property
    def layer(self) -> int:
        """Index of the block, from 0."""

    @property
    def name(self) -> str:
        """Which FFN of the block: `ffn`, `token_mixing`, `channel_mixing`, …"""

    @property
    def pre(self) -> nn.Module:
        """The module whose output is the pre-activation (up; gate where gated)."""

    @property
    def post(self) -> nn.Module:
        """The module whose input is the post-activation (down)."""


@dataclass(frozen=True)
class FFNAdapter:
    """Describes one FFN of a model that does not fulfil the `FFN` protocol itself.

    For a GPT-2 of Hugging Face: `FFNAdapter(i, "ffn", block.mlp.c_fc, block.mlp.c_proj)`.
    """

    layer: int
    name: str
    pre: nn.Module
    post: nn.Module


def find_ffns(model: nn.Module, layers: Collection[int] | None = None) -> list[FFN]:
    """The FFNs among a model's modules, by layer, in the order in which the model lists them.

    Args:
        model: whose modules fulfil `FFN`.
        layers: the layers to take; None for all.

    Raises:
        MeasurementError: if there is none, or if one of `layers` has none.
    """
    found: list[FFN] = [module for module in model.modules() if isinstance(module, FFN)]
    if not found:
        raise MeasurementError(
            f"A model to measure needs FFNs with attributes layer, name, pre and post; "
            f"{type(model).__name__} has none. Describe them with nerve.FFNAdapter."
        )
    known = sorted({ffn.layer for ffn in found})
    unknown = sorted(set(layers or ()) - set(known))
    if unknown or (layers is not None and not layers):
        raise MeasurementError(
            f"Layers to measure must have FFNs, as {', '.join(map(str, known))} have; got "
            f"{', '.join(map(str, unknown)) or 'none'}."
        )
    chosen = [ffn for ffn in found if layers is None or ffn.layer in layers]
    return sorted(chosen, key=lambda ffn: ffn.layer)
