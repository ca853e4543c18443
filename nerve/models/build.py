"""Builds a network from the resolved configuration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from nerve.config import from_mapping, require, require_choice
from nerve.errors import ConfigError, first_line
from nerve.models.gpt import GPT, GPTConfig
from nerve.models.mixer import Mixer, MixerConfig, Mixing
from nerve.nn.activation import Activation
from nerve.nn.ffn import FFNDesign
from nerve.nn.normalization import Normalization
from nerve.nn.position import Position

MODELS: dict[str, type[GPT] | type[Mixer]] = {"gpt": GPT, "mixer": Mixer}

FACTORS: dict[str, type] = {
    "normalization": Normalization,
    "activation": Activation,
    "position": Position,
    "ffn": FFNDesign,
}
"""The configuration group of each design factor of a network, and the class of its values."""

_SUBGROUPS: dict[str, type] = {"token_mixing": Mixing, "channel_mixing": Mixing}


def model_design(values: Mapping[str, Any], **data_dims: int) -> GPTConfig | MixerConfig:
    """The checked design of the network that `values` describe.

    Args:
        values: the resolved configuration; its groups `model` and those of `FACTORS` are read.
        data_dims: dimensions of the data: `vocab_size`, or `image_size`, `n_channels` and
            `n_classes`.

    Raises:
        ConfigError: for an unknown name, or a value out of range.
    """
    kind = values["model"].get("kind")
    require_choice("model.kind", kind, MODELS)
    network = MODELS[kind]
    require(
        set(data_dims) == set(network.DATA_DIMS),
        f"model.kind={kind} needs data with {', '.join(network.DATA_DIMS)}; the chosen data has "
        f"{', '.join(data_dims)}. Choose another data group or another model.",
    )
    model = {
        key: from_mapping(_SUBGROUPS[key], value, f"model.{key}") if key in _SUBGROUPS else value
        for key, value in values["model"].items()
        if key != "kind"
    }
    factors: dict[str, Any] = {
        name: from_mapping(cls, values[name], name) for name, cls in FACTORS.items()
    }
    design: Any = from_mapping(network.Config, {**model, **data_dims, **factors}, "model")
    return cast(GPTConfig | MixerConfig, design)


@dataclass(frozen=True)
class Skeleton:
    """The parameters of a network without their memory, at a cost that does not grow with its
    depth.

    The second block shows what a block adds, because parameters that blocks share appear only in
    the first one. The remaining blocks are like the second.

    Attributes:
        network: the network with its first two blocks, on the meta device.
        n_layers: number of blocks of the whole network.
    """

    network: GPT | Mixer
    n_layers: int

    @classmethod
    def of(cls, design: GPTConfig | MixerConfig) -> "Skeleton":
        """The skeleton of a design, as returned by `model_design`.

        Raises:
            ConfigError: for a network that cannot be built, or whose sizes exceed any memory.
        """
        n_blocks = min(design.n_layers, 2)
        # The placement of norms changes no parameter, and a mix of placements needs two blocks.
        norms = replace(design.normalization, placement="pre", n_post_layers=0)
        short: Any = replace(design, n_layers=n_blocks, normalization=norms)
        network = next(each for each in MODELS.values() if each.Config is type(design))
        try:
            with torch.device("meta"):
                return cls(network(short, seed=0), design.n_layers)
        except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # from torch
            raise ConfigError(
                "The weights of a model must fit into memory; those of model and ffn do not: "
                f"{first_line(error)}. Use smaller sizes."
            ) from error

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, parameter (on the meta device) and multiplicity of each parameter."""
        n_blocks = len(self.network.blocks)
        for name, parameter in self.network.named_parameters():
            is_of_last = name.startswith(f"blocks.{n_blocks - 1}.")
            yield name, parameter, self.n_layers - n_blocks + 1 if is_of_last else 1

    @property
    def n_parameters(self) -> int:
        """The number of parameters of the whole network."""
        return sum(parameter.numel() * n_alike for _, parameter, n_alike in self.parameters())


def build_model(values: Mapping[str, Any], *, seed: int, **data_dims: int) -> GPT | Mixer:
    """The network that `values` describe, initialized from `seed`.

    Args:
        values, data_dims: as in `model_design`.
        seed: determines the initial weights.

    Raises:
        ConfigError: for an unknown name, a value out of range, a combination that cannot be built,
            or data without the dimensions that the model needs.
    """
    config: Any = model_design(values, **data_dims)
    return MODELS[values["model"]["kind"]](config, seed=seed)
