"""Which stream's tokens each FFN receives and in which order, as shown by one forward pass."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named, tokens_of
from nerve.measuring.probe import Probe
from nerve.measuring.streams import Stream, as_mapping, unpadded_of


class TraceError(MeasurementError):
    """The model does not run on two shortened sequences, or they cannot be told apart."""


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
        TraceError: if the model cannot run on such a batch, or the batch is empty.
        MeasurementError: for features that do not match the descriptions of the FFNs.
    """
    if any(0 in stream.sizes for stream in streams.values()):
        sizes = ", ".join(str(stream.sizes) for stream in streams.values())
        raise TraceError(
            "The first batch shows which tokens each FFN receives, and in which order, so it must "
            f"have tokens; got [sequence, position] of {sizes}. Put a batch with tokens first."
        )
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
    unpadded = unpadded_of(first)
    row = 0 if unpadded is None else int(unpadded.sum(1).argmax())
    return {key: _cut(key, value, streams, lengths, row) for key, value in batch.items()}, lengths


def _cut(
    key: str, value: Any, streams: dict[str, Stream], lengths: dict[str, int], row: int
) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    of_decoder = key.startswith(("decoder_", "tgt")) or key == "labels"
    prefix = "decoder_" if of_decoder and "decoder_" in streams else ""
    stream = streams.get(prefix)
    if value.shape[0] != (stream or next(iter(streams.values()))).sizes[0]:
        return value
    twice = value[[row, row]]
    if stream is None:  # such as what a decoder alone receives of an encoder
        return twice
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
