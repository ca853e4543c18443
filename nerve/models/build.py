"""From the resolved configuration to a network."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from nerve.config import from_mapping, require, require_choice
from nerve.errors import ConfigError
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
"""The configuration group of each design factor of a network, and the values it becomes."""

_SUBGROUPS: dict[str, type] = {"token_mixing": Mixing, "channel_mixing": Mixing}


def model_design(values: Mapping[str, Any], **data_dims: int) -> GPTConfig | MixerConfig:
    """What defines the network that `values` describe, checked.

    Args:
        values: the resolved configuration; its groups `model` and those of `FACTORS` are read.
        data_dims: what the data gives: `vocab_size`, or `image_size`, `n_channels` and `n_classes`.

    Raises:
        ConfigError: for an unknown name, or a value out of range.
    """
    kind = values["model"].get("kind")
    require_choice("model.kind", kind, MODELS)
    network = MODELS[kind]
    require(
        set(data_dims) == set(network.DATA_DIMS),
        f"model.kind={kind} needs data that gives {', '.join(network.DATA_DIMS)}; the chosen "
        f"data gives {', '.join(data_dims)}. Choose another data group or another model.",
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
    """The parameters of a network without its memory, at a price that does not grow with its depth.

    Attributes:
        network: the network with its first two blocks, on the meta device; all others are like the
            second one. (The first may hold what all blocks share.)
        n_layers: blocks of the whole network.
    """

    network: GPT | Mixer
    n_layers: int

    @classmethod
    def of(cls, design: GPTConfig | MixerConfig) -> "Skeleton":
        """That of what `model_design` gives.

        Raises:
            ConfigError: for what cannot be built, or has sizes that no memory has.
        """
        normalization = design.normalization
        if normalization.n_post_layers:
            normalization = replace(normalization, n_post_layers=1)
        n_blocks = min(design.n_layers, 2)
        short: Any = replace(design, n_layers=n_blocks, normalization=normalization)
        network = next(each for each in MODELS.values() if each.Config is type(design))
        try:
            with torch.device("meta"):
                return cls(network(short, seed=0), design.n_layers)
        except (RuntimeError, OverflowError, MemoryError, TypeError) as error:  # as torch likes
            raise ConfigError(
                "The weights of a model must fit into memory; those of model and ffn do not: "
                f"{str(error).splitlines()[0]}. Use smaller sizes."
            ) from error

    def parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """Name, shape (a parameter on the meta device) and number of parameters alike."""
        for name, parameter in self.network.named_parameters():
            yield name, parameter, self.n_layers - 1 if name.startswith("blocks.1.") else 1

    @property
    def n_parameters(self) -> int:
        """Numbers in the parameters of the whole network."""
        return sum(parameter.numel() * n_alike for _, parameter, n_alike in self.parameters())


def build_model(values: Mapping[str, Any], *, seed: int, **data_dims: int) -> GPT | Mixer:
    """The network that `values` describe, initialized from `seed`.

    Args:
        values, data_dims: as of `model_design`.
        seed: decides the initial weights.

    Raises:
        ConfigError: for an unknown name, a value out of range, a combination that cannot be built,
            or data that does not give what the model needs.
    """
    config: Any = model_design(values, **data_dims)
    return MODELS[values["model"]["kind"]](config, seed=seed)
