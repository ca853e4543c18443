"""The streams of tokens in a batch, and how they are arranged in the features of each FFN."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named, tokens_of
from nerve.measuring.masks import as_bool, without_first
from nerve.measuring.probe import Probe

UNLABELED = -100
"""The label of a token that no loss counts, torch's and transformers' convention."""

_NAMES = {"": "the batch's tokens", "decoder_": "the decoder's tokens"}


class TraceError(MeasurementError):
    """The model does not run on two shortened sequences, or they cannot be told apart."""


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
        if not prefix and mask is None:
            padding = _tensor(batch, "src_key_padding_mask")
            mask = None if padding is None else ~as_bool(padding)
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
        found = [(each.ids, each.mask) for each in streams] or [(ids_of(batch), None)]
        for ids, mask in found:
            if ids is not None:
                flat = ids.reshape(-1) if mask is None else ids[as_bool(mask)]
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


class Traced(NamedTuple):
    """Where an FFN's samples come from.

    Attributes:
        stream: the prefix of its stream; None if its samples are not tokens of a stream.
        batch_first: whether they are ordered sequence by sequence.
        ran: whether there were any.
    """

    stream: str | None
    batch_first: bool = True
    ran: bool = True


class Trace(NamedTuple):
    """The result of a forward pass of two equal, shortened sequences.

    Attributes:
        ffns: for each FFN, where its samples come from.
        batch: the batch of that pass, in the model's format.
        lengths: number of positions of each stream in it, by prefix.
    """

    ffns: list[Traced]
    batch: Any
    lengths: dict[str, int]

    def stream_of(self, mask: Tensor) -> str | None:
        """The stream that a mask `[sequence, position]` of `batch` belongs to; None if there is
        none."""
        sizes = {torch.Size((2, n)): prefix for prefix, n in self.lengths.items()}
        return sizes.get(mask.shape)


def trace(
    probe: Probe, run: Callable[[Any], object], batch: Any, streams: dict[str, Stream]
) -> Trace:
    """Determines which stream's tokens each FFN receives, and in which order.

    Equal shapes prove nothing, so the model runs on one sequence, twice in a batch, with each
    stream cut to a different length. Features whose number matches belong to that stream, and the
    two sequences are equal in the right order.

    Raises:
        TraceError: if the model cannot run on such a batch.
        MeasurementError: for features that do not match the descriptions of the FFNs.
    """
    cut, lengths = _reduced(as_mapping(batch), streams)
    if not isinstance(batch, Mapping):
        (cut,) = cut.values()
    seen: dict[int, Tensor] = {}
    n_samples = Counter[int]()

    def receive(index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        n_samples[index] += pre[..., 0].numel()
        if index not in seen and tokens_of(probe.ffns[index]) is None:
            seen[index] = pre.clone()

    probe.start(receive)
    try:
        run(cut)
        # For experts these are the tokens of all, even if one of them received none.
        tokens = {index: probe.tokens_of(index) for index in range(len(probe.ffns))}
        seen |= {index: each for index, each in tokens.items() if each is not None}
        probe.finish_forward()
    except MeasurementError:
        raise
    except Exception as error:
        raise TraceError(
            "To determine which FFNs a mask applies to, and the order of their tokens, the model "
            f"runs on two equal, shorter sequences; it failed: {error}. Give one mask for each FFN "
            "with mask=, without skip_first= and exclude=."
        ) from error
    finally:
        probe.stop()
    is_short = {prefix: lengths[prefix] == 1 < streams[prefix].sizes[1] for prefix in streams}
    traced = [
        _traced(seen.get(index), lengths, ffn, is_short) for index, ffn in enumerate(probe.ffns)
    ]
    for index, (ffn, place) in enumerate(zip(probe.ffns, traced, strict=True)):
        is_apart = index in seen and place.stream is None and tokens_of(ffn) is None
        if is_apart and n_samples[index] in {2 * n for n in lengths.values()}:
            raise TraceError(
                f"{named(ffn)} receives the tokens of a stream in several parts, whose order is "
                "unknown. Set the model to process its batches whole; or give batches without "
                "padding, and leave skip_first=, exclude=, only_labeled= and groups= out."
            )
    return Trace(traced, cut, lengths)


def _reduced(batch: Mapping[str, Any], streams: dict[str, Stream]) -> tuple[Any, dict[str, int]]:
    """The batch with its fullest sequence twice, and the number of positions left in each
    stream."""
    lengths: dict[str, int] = {}
    for prefix, stream in streams.items():
        n = stream.sizes[1]
        # At least two positions: one would not show the order of sequences and positions.
        others = (m for m in (n - 1, n - 2, n) if m >= 2 and m not in lengths.values())
        lengths[prefix] = next(others, 1)
    first = next(iter(streams.values()))
    row = 0 if first.mask is None else int(as_bool(first.mask).sum(1).argmax())
    return {key: _cut(key, value, streams, lengths, row) for key, value in batch.items()}, lengths


def _cut(
    key: str, value: Any, streams: dict[str, Stream], lengths: dict[str, int], row: int
) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    of_decoder = key.startswith("decoder_") or key == "labels"
    prefix = "decoder_" if of_decoder and "decoder_" in streams else ""
    if prefix not in streams or value.shape[0] != streams[prefix].sizes[0]:
        return value
    twice = value[[row, row]]
    stream = streams[prefix]
    # Next to token ids, three-dimensional floats may be something else, such as patches.
    of_tokens = value.ndim == 2 or not value.is_floating_point() or stream.ids is None
    if value.ndim >= 2 and of_tokens and value.shape[1] == stream.sizes[1]:
        return twice[:, : lengths[prefix]].contiguous()  # models may view it
    return twice


def _traced(
    pre: Tensor | None, sizes: dict[str, int], ffn: FFN, is_short: dict[str, bool]
) -> Traced:
    """What the features of two equal sequences show; not their order if only one of several
    positions is left."""
    if pre is None:
        return Traced(None, ran=False)
    n_samples, width = pre[..., 0].numel(), pre.shape[-1]
    for prefix, n_positions in sizes.items():
        if n_samples != 2 * n_positions:
            continue
        if is_short[prefix]:
            raise TraceError(
                "Sequences must have at least three tokens to determine their order; those of "
                f"{named(ffn)} have two. Give its mask with mask=."
            )
        by_sequence = pre.reshape(2, n_positions, width)
        by_position = pre.reshape(n_positions, 2, width)
        apart = _difference(*by_sequence), _difference(*by_position.unbind(1))
        if min(apart) < (1e-3 if pre.dtype.itemsize > 2 else 5e-2):
            return Traced(prefix, batch_first=apart[0] <= apart[1])
        raise TraceError(
            f"Tokens must be ordered by sequence or by position; those of {named(ffn)} are not. "
            "Give its mask with mask=."
        )
    return Traced(None)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest value; NaN in both counts as equal."""
    size = float(one.abs().nan_to_num().amax())
    apart = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0)
    return float(apart.nan_to_num(torch.inf).amax()) / size if size else 0.0


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


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a transformers model has a decoder and an encoder, so that labels belong to the
    decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _tensor(batch: Mapping[str, Any], key: str) -> Tensor | None:
    value = batch.get(key)
    return value if isinstance(value, Tensor) else None
