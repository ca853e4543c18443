"""The streams of tokens in a batch, and which of their tokens count."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.masks import as_bool, without_first

UNLABELED = -100
"""The label of a token that no loss counts, torch's and transformers' convention."""

_NAMES = {"": "the batch's tokens", "decoder_": "the decoder's tokens"}

_PADDING = {"": "src_key_padding_mask", "decoder_": "tgt_key_padding_mask"}
"""The masks of nn.Transformer, True for padding, by the prefix of their streams."""


class Stream(NamedTuple):
    """Tokens of a batch that belong together.

    Attributes:
        sizes: the sizes of the batch, `[n_sequences, n_positions]`.
        mask: the padding mask, if the batch has one.
        ids, labels: the tokens and the targets, if the batch has them.
    """

    sizes: tuple[int, int]
    mask: Tensor | None
    ids: Tensor | None
    labels: Tensor | None


def streams_of(batch: Any, *, is_encoder_decoder: bool) -> dict[str, Stream]:
    """The streams of a mapping, by the prefix of their keys: `""`, and `decoder_` if present; none
    for other batches."""
    if not isinstance(batch, Mapping):
        return {}
    found = {}
    for prefix in _NAMES:
        mask, ids, embedded = (
            _tensor(batch, prefix + name)
            for name in ("attention_mask", "input_ids", "inputs_embeds")
        )
        if mask is None and (padding := _tensor(batch, _PADDING[prefix])) is not None:
            mask = ~as_bool(padding)
        labels = _tensor(batch, "labels") if is_encoder_decoder == bool(prefix) else None
        for tensor in (ids, embedded, mask, labels if prefix else None):
            if tensor is not None and tensor.ndim >= 2:
                sizes = (tensor.shape[0], tensor.shape[1])
                of_tokens = labels is not None and tuple(labels.shape) == sizes
                found[prefix] = Stream(sizes, mask, ids, labels if of_tokens else None)
                break
    return found


def ids_of(batch: Any) -> Tensor | None:
    """The token ids of a batch without streams: integers `[sequence, position]`, its first
    entry."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else None
    is_ids = isinstance(first, Tensor) and first.ndim == 2 and not first.is_floating_point()
    return first if is_ids else None


def count_tokens(batches: Iterable[Any]) -> Tensor:
    """Number of occurrences of each token id in batches, without padding, `[highest id + 1]`.

    Raises:
        MeasurementError: if they have no token ids.
    """
    counts = torch.zeros(0, dtype=torch.int64)
    for batch in batches:
        streams = streams_of(as_mapping(batch), is_encoder_decoder=False).values()
        found = [(each.ids, unpadded_of(each)) for each in streams] or [(ids_of(batch), None)]
        for ids, unpadded in found:
            if ids is not None:
                flat = ids.reshape(-1) if unpadded is None else ids[unpadded]
                here = torch.bincount(flat.clamp(min=0).cpu())
                length = max(len(counts), len(here))
                counts, here = (
                    torch.nn.functional.pad(each, (0, length - len(each)))
                    for each in (counts, here)
                )
                counts = counts + here
    if not counts.sum():
        raise MeasurementError(
            "Groups by frequency need token ids: batches that are mappings with input_ids, or "
            "tensors of ids, [sequence, position]; got none. Leave frequency out of groups."
        )
    return counts


def as_mapping(batch: Any) -> Any:
    """Wraps a bare tensor of tokens, `[batch, sequence]` of integers or `[batch, sequence, width]`
    of floats, in a mapping under its usual name; returns other batches unchanged."""
    if not isinstance(batch, Tensor) or batch.is_nested:
        return batch
    if batch.ndim == 2 and not batch.is_floating_point():
        return {"input_ids": batch}
    return {"inputs_embeds": batch} if batch.ndim == 3 and batch.is_floating_point() else batch


def counting(
    stream: Stream, name: str, exclude: Sequence[int], only_labeled: bool, skip_first: int = 0
) -> Tensor | None:
    """The mask of a stream's tokens that count; None if all do. The first positions of a sequence
    are those after its left padding; without such padding, they are left to the caller.

    Raises:
        MeasurementError: if the batch does not contain what is needed.
    """
    mask = None if stream.mask is None else as_bool(stream.mask)
    if mask is not None and tuple(mask.shape) != stream.sizes:
        raise MeasurementError(
            f"The attention_mask of {_NAMES[name]} must be [batch, sequence], {stream.sizes}; got "
            f"{tuple(mask.shape)}. Give mask=lambda batch: …, True for the tokens that count."
        )
    parts = [] if mask is None else [without_first(mask, skip_first)]
    if exclude:
        if stream.ids is None:
            raise MeasurementError(
                f"exclude= selects by token id, so each batch needs {name}input_ids; got none. "
                "Leave out exclude=, or give mask=."
            )
        ids = torch.tensor(list(exclude), device=stream.ids.device)
        parts.append(~torch.isin(stream.ids, ids))
    if only_labeled and stream.labels is not None:
        parts.append(stream.labels != UNLABELED)
    if not parts:
        return None
    counts = torch.stack([part.to(parts[0].device) for part in parts]).all(0)
    return None if bool(counts.all()) else counts


def unpadded_of(stream: Stream) -> Tensor | None:
    """True for the tokens of a stream that are no padding, `[sequence, position]`; None if its mask
    does not show this: there is none, or it is one of pairs of tokens, or additive."""
    if stream.mask is None or tuple(stream.mask.shape) != stream.sizes:
        return None
    try:
        return as_bool(stream.mask)
    except MeasurementError:
        return None


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, at any depth."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, tuple | list):
        for value in batch:
            yield from tensors_of(value)


def require_unpacked(batch: Any) -> None:
    """Raises `MeasurementError` if rows of a mapping contain several sequences each, as its
    positions or the bounds of these sequences show."""
    if not isinstance(batch, Mapping):
        return
    places, mask = _tensor(batch, "position_ids"), _tensor(batch, "attention_mask")
    ids = _tensor(batch, "input_ids")
    n_rows = len(ids) if ids is not None and ids.ndim > 1 else 1
    bounds = (key for key in batch if key.startswith(("cu_seq", "cumulative_seq")))
    sizes = {key: bound.numel() for key in bounds if (bound := _tensor(batch, key)) is not None}
    why = next((key for key, n in sizes.items() if n > n_rows + 1), None)
    if places is not None and places.ndim == 2 and places.shape[1] > 1:
        steps = places.diff() > 0
        if mask is not None and mask.shape == places.shape:
            counts = as_bool(mask)  # padding has any positions
            steps = steps | ~(counts[:, 1:] & counts[:, :-1])
        why = why if bool(steps.all()) else "position_ids"
    if why is not None:
        raise MeasurementError(
            "skip_first= and groups by position count the positions of one sequence per row; rows "
            f"of this batch contain several, as {why} shows. Give batches with one sequence per "
            "row; or, in place of skip_first=, mask=lambda batch: batch['position_ids'] > 0."
        )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has a decoder and an encoder, so that labels belong to the
    decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _tensor(batch: Mapping[str, Any], key: str) -> Tensor | None:
    value = batch.get(key)
    return value if isinstance(value, Tensor) else None
