"""Which stream's tokens each FFN receives and in which order, as shown by short forward passes."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named, tokens_of
from nerve.measuring.probe import Probe
from nerve.measuring.streams import Stream, as_mapping, tensors_of, unpadded_of


class TraceError(MeasurementError):
    """The model does not run on two shortened sequences, or they cannot be told apart."""


class Traced(NamedTuple):
    """Where an FFN's samples come from.

    Attributes:
        stream: the prefix of its stream; None if its samples are not tokens of a stream.
        batch_first: whether they are ordered sequence by sequence.
        ran: whether there were any.
        is_other: whether their number depends on that of the tokens, although they are not these:
            tokens with others among them, or fewer of them.
    """

    stream: str | None
    batch_first: bool = True
    ran: bool = True
    is_other: bool = False


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
    whole = cut if isinstance(batch, Mapping) else next(iter(cut.values()))
    seen, n_samples = _features(probe, run, whole)
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
    if any(each.ran and each.stream is None for each in traced):
        halves = {prefix: max(2, n // 2) for prefix, n in lengths.items()}
        shorter, _ = _reduced(as_mapping(batch), streams, halves)
        shorter = shorter if isinstance(batch, Mapping) else next(iter(shorter.values()))
        try:
            _, n_shorter = _features(probe, run, shorter)
        except TraceError:
            n_shorter = Counter()  # not to be told
        for index, place in enumerate(traced):
            if place.ran and place.stream is None and n_shorter[index] != n_samples[index]:
                traced[index] = place._replace(is_other=True)
    return Trace(traced, whole, lengths)


def require_sequences(probe: Probe, run: Callable[[Any], object], batch: Any) -> None:
    """Checks that each FFN receives its samples sequence by sequence, of a batch without streams:
    as a pass of one of its sequences, twice, shows.

    Raises:
        TraceError: if it does not, or the model cannot run on such a batch.
    """
    seen, _ = _features(probe, run, _twice(batch))
    for index, rows in seen.items():
        if rows.ndim < 3:  # without sequences, which is checked where they are needed
            continue
        is_right = rows.ndim == 3 and len(rows) == 2 and _are_equal(*rows)
        if not is_right:
            raise TraceError(
                "skip_first= and groups= need samples [sequence, position]; of a batch of one "
                f"sequence, twice, {named(probe.ffns[index])} receives {tuple(rows.shape[:-1])}, "
                "which are not its positions, sequence by sequence. Give batches that are mappings "
                "with input_ids or inputs_embeds, with forward= if the model takes others; or "
                "leave these options out."
            )


def _twice(batch: Any) -> Any:
    """The first sequence of a batch twice: of every tensor that has as many as the first one.

    Raises:
        TraceError: for a batch without tensors.
    """
    n = next((len(each) for each in tensors_of(batch) if each.ndim), 0)
    if not n:
        raise TraceError(
            "skip_first= and groups= count positions, so batches must show their sequences; got a "
            f"{type(batch).__name__} without tensors. Give batches that are mappings with "
            "input_ids, with forward= if the model takes others."
        )

    def twice(each: Any) -> Any:
        if isinstance(each, Mapping):
            return {key: twice(value) for key, value in each.items()}
        if type(each) in (tuple, list):
            return type(each)(map(twice, each))
        is_batch = isinstance(each, Tensor) and each.ndim > 0 and len(each) == n
        return each[[0, 0]] if is_batch else each

    return twice(batch)


def _features(
    probe: Probe, run: Callable[[Any], object], batch: Any
) -> tuple[dict[int, Tensor], Counter[int]]:
    """Pre of the first run of each FFN on a short batch, or the tokens of all experts beside it;
    and the number of samples of all its runs, or of these tokens.

    Raises:
        TraceError: if the model cannot run on such a batch.
        MeasurementError: for features that do not match the descriptions of the FFNs.
    """
    seen: dict[int, Tensor] = {}
    n_samples = Counter[int]()

    def receive(index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        if tokens_of(probe.ffns[index]) is None:
            n_samples[index] += pre[..., 0].numel()
            seen.setdefault(index, pre.clone())

    probe.start(receive)
    try:
        run(batch)
        # For experts these are the tokens of all, even if one of them received none.
        for index in range(len(probe.ffns)):
            tokens = probe.tokens_of(index)
            if tokens is not None:
                seen[index], n_samples[index] = tokens, tokens[..., 0].numel()
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
    return seen, n_samples


def _reduced(
    batch: Mapping[str, Any], streams: dict[str, Stream], lengths: dict[str, int] | None = None
) -> tuple[Any, dict[str, int]]:
    """The batch with its fullest sequence twice, and the number of positions left in each
    stream: `lengths`, or by default about as many as there are."""
    given, lengths = lengths, {}
    for prefix, stream in streams.items():
        n = stream.sizes[1]
        # At least two positions: one would not show the order of sequences and positions.
        others = (m for m in (n - 1, n - 2, n) if m >= 2 and m not in lengths.values())
        lengths[prefix] = next(others, 1) if given is None else given[prefix]
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
        if min(apart) < _most_apart(pre):
            return Traced(prefix, batch_first=apart[0] <= apart[1])
        raise TraceError(
            f"Tokens must be ordered by sequence or by position; those of {named(ffn)} are not. "
            "Give its mask with mask=."
        )
    return Traced(None)


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return _difference(one, other) < _most_apart(one)


def _most_apart(pre: Tensor) -> float:
    """The largest difference that is rounding."""
    return 1e-3 if pre.dtype.itemsize > 2 else 5e-2


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference relative to the largest value; NaN in both counts as equal."""
    size = float(one.abs().nan_to_num().amax())
    apart = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0)
    return float(apart.nan_to_num(torch.inf).amax()) / size if size else 0.0
