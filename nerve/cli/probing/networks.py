"""What a transformers network reveals about itself."""

from typing import Any

from torch import nn

from nerve.measuring.found import FoundFFNs

_NO_COLUMNS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_ACTIVATION = (
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "dense_act_fn",
    "activation",
)


def n_embedded(model: nn.Module) -> int:
    """Number of tokens that have an embedding."""
    embedding: Any = model.get_input_embeddings
    return int(embedding().weight.shape[0])


def text_config(model: nn.Module) -> Any:
    """The configuration of the part that reads text, if a model has other parts, too."""
    config: Any = model.config
    return config.get_text_config()


def columns(model: nn.Module, ffns: FoundFFNs) -> dict[str, Any]:
    """What distinguishes a model from others, under the names that nerve-run uses, plus the model's
    own configuration."""
    whole: Any = model.config
    config, table = text_config(model), ffns.table()
    sizes = {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "seq_len": "max_position_embeddings",
        "vocab_size": "vocab_size",
    }
    own_sizes = {name: getattr(config, key, None) for name, key in sizes.items()}
    activations = (getattr(config, name, None) for name in _ACTIVATION)
    return {
        "model": {"kind": config.model_type, "class": type(model).__name__, **own_sizes},
        "activation": {"name": next((each for each in activations if each), None)},
        "normalization": {"kind": _normalization(model)},
        "ffn": {name: _only(table[name].tolist()) for name in ("d_ff", "gated")},
        "transformers": {
            key: value for key, value in whole.to_dict().items() if key not in _NO_COLUMNS
        },
    }


def _normalization(model: nn.Module) -> str:
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    if any(isinstance(module, nn.LayerNorm) for module in norms):
        return "layernorm"
    return "rmsnorm" if norms else "none"


def _only(values: list[Any]) -> Any:
    """The common value, or the distinct values if they differ."""
    different = list(dict.fromkeys(values))
    return different[0] if len(different) == 1 else different
