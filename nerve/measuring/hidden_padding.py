"""Refuses padding that a model knows of but a batch does not show, because it would be counted."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.arguments import by_names, signature_of
from nerve.measuring.tap import Hook

_OF_TORCH = ("key_padding_mask", "src_key_padding_mask", "tgt_key_padding_mask")
"""Arguments of torch's modules for attention: True, or minus infinity, for padding."""

_TOKENS = ("input_ids", "inputs_embeds")


@contextmanager
def hidden_padding_refused(model: nn.Module) -> Iterator[None]:
    """Raises `MeasurementError` within the block if the model, or one of its modules, receives a
    mask that excludes padding, although the batch shows none."""
    with ExitStack() as stack:
        for module in model.modules():
            if _may_get_mask(module, is_root=module is model):
                handle = module.register_forward_pre_hook(Hook(_look), with_kwargs=True)
                stack.callback(handle.remove)
        yield


def _may_get_mask(module: nn.Module, *, is_root: bool) -> bool:
    try:
        names = signature_of(module).parameters.keys()
    except (TypeError, ValueError):  # a forward that is not written in Python
        return False
    has_tokens = is_root or any(name in names for name in _TOKENS)
    return any(name in names for name in _OF_TORCH) or (has_tokens and "attention_mask" in names)


def _look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = by_names(module, args, kwargs)
    name = next((name for name in _OF_TORCH if _is_padding(given.get(name))), None)
    if name is None and _excludes_tokens(given):
        name = "attention_mask"
    if name is not None:
        raise MeasurementError(
            f"Padding must not be measured; {type(module).__name__} receives an argument "
            f"{name} that excludes samples, and the batch shows no mask under a known name. "
            "Give batches that are mappings with an attention_mask; or mask=lambda batch: …, True "
            "for the samples that count (mask=lambda batch: None counts all)."
        )


def _is_padding(mask: Any) -> bool:
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    is_padding = mask if mask.dtype == torch.bool else mask == -torch.inf
    return bool(is_padding.any())


def _excludes_tokens(given: Mapping[str, Any]) -> bool:
    """Whether an attention mask is one of tokens, `[sequence, position]`, and excludes some."""
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return False
    others = (each for each in given.values() if isinstance(each, Tensor) and each is not mask)
    if not any(each.shape[:2] == mask.shape for each in others):
        return False
    is_causal = mask.shape[0] == mask.shape[1] and bool((mask == mask.tril()).all())
    is_of_tokens = bool(((mask == 0) | (mask == 1)).all())
    return is_of_tokens and not is_causal and not bool((mask == 1).all())
