"""From the resolved configuration to a network."""

from collections.abc import Mapping
from typing import Any, cast

from nerve.config import from_mapping, require, require_choice
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
