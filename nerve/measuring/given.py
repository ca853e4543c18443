"""What a caller gives in Python: refused where it is of another kind than its place takes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral
from typing import Any

from torch import nn

from nerve.config import require
from nerve.measuring.ffns import FFN

_FUNCTIONS = {
    "mask": "mask=lambda batch: batch[...] != padding",
    "forward": "forward=lambda model, batch: model(batch[0])",
}


def require_model(model: object) -> None:
    """Raises `ConfigError` unless `model` is a torch module."""
    require(isinstance(model, nn.Module), f"A model is a torch module; got {told(model)}.")


def require_mapping(key: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is a mapping by name, or None."""
    require(
        value is None or (isinstance(value, Mapping) and all(isinstance(k, str) for k in value)),
        f"{key} is a mapping by name, such as {{'family': 'mine'}}; got {told(value)}.",
    )


def check_given(
    *,
    ffns: Sequence[FFN] | None = None,
    mask: Callable[..., Any] | None = None,
    forward: Callable[..., Any] | None = None,
    exclude: Collection[int] = (),
) -> None:
    """Checks what is given to be called or looked through, as `nerve.measure` takes it.

    Raises:
        ConfigError: for what is of another kind.
    """
    for key, value in (("mask", mask), ("forward", forward)):
        require(
            value is None or callable(value),
            f"{key} is a function, which gets each batch; got {told(value)}. Give "
            f"{_FUNCTIONS[key]}.",
        )
    require(
        isinstance(exclude, Collection) and all(_is_id(each) for each in exclude),
        f"exclude is a list of token ids, such as tokenizer.all_special_ids; got {told(exclude)}.",
    )
    if ffns is None:
        return
    is_list = isinstance(ffns, Sequence | nn.ModuleList) and not isinstance(ffns, str)
    wrong = next((each for each in ffns if not isinstance(each, FFN)), None) if is_list else ffns
    require(
        is_list and wrong is None,
        f"ffns is a list of descriptions of FFNs; got {'one of ' if is_list else ''}{told(wrong)}. "
        "Give nerve.find_ffns(model, batch), of which select= takes some, or describe each: "
        '[nerve.FFNAdapter(layer, "ffn", block.up, block.down)].',
    )


def told(value: object) -> str:
    """A value as messages show it: what is short as it is, else its type."""
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text}" if isinstance(value, str | int | float) and len(text) < 60 else kind


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
