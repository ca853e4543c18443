"""Which samples of a batch count: as the caller says, or as the batch itself shows."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.ffns import named
from nerve.measuring.hidden_padding import hidden_padding_refused
from nerve.measuring.masks import Chosen, Masks, Order, UnknownOrder, for_each, without_first
from nerve.measuring.probe import Probe
from nerve.measuring.streams import (
    Stream,
    as_mapping,
    counting,
    ids_of,
    is_encoder_decoder,
    require_unpacked,
    streams_of,
    unpadded_of,
)
from nerve.measuring.trace import Trace, Traced, TraceError, require_sequences, trace

_CACHES = ("past_key_values", "cache", "cache_params")


class Choice:
    """Which samples of a batch count, for each FFN.

    Args:
        model: the model.
        probe: an installed probe that taps the FFNs.
        run: runs the model on a batch, without gradients and in eval mode.
        mask, exclude, only_labeled: as in `nerve.measure`.
        skip_first: number of positions to skip at the beginning of each sequence, which requires a
            known order; those after left padding are skipped here.
        groups: how samples are grouped, which requires a known order, too.

    Raises:
        MeasurementError: for `mask` together with options that it replaces.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        run: Callable[[Any], object],
        mask: Callable[[Any], Masks] | None,
        exclude: Sequence[int],
        only_labeled: bool,
        skip_first: int,
        groups: Collection[str] = (),
    ) -> None:
        if mask is not None and (exclude or only_labeled):
            raise MeasurementError(
                "mask= already selects the samples that count; exclude= and only_labeled= only "
                "apply to batches without mask=. Leave out one or the other."
            )
        self._is_encoder_decoder = is_encoder_decoder(model)
        self._probe, self._run, self._mask = probe, run, mask
        self._exclude, self._only_labeled = exclude, only_labeled
        self._skip_first, self._needs_order = skip_first, skip_first > 0 or bool(groups)
        self._counts_positions = skip_first > 0 or "position" in groups
        self._trace: Trace | None = None
        self._has_sequences = not self._needs_order
        self.shows_padding = False
        """Whether the last batch, or the caller, shows which samples are padding."""

    @property
    def has_mask(self) -> bool:
        """Whether the caller has given a mask, which is called with each batch."""
        return self._mask is not None

    def of(self, batch: Any) -> Chosen:
        """The samples of this batch that count."""
        batch = _without_cache(batch)
        mapping = as_mapping(batch)
        if self._counts_positions:
            require_unpacked(mapping)
        streams = streams_of(mapping, is_encoder_decoder=self._is_encoder_decoder)
        has_masks = any(stream.mask is not None for stream in streams.values())
        self.shows_padding = self._mask is not None or has_masks
        if self._trace is not None and self._trace.lengths.keys() != streams.keys():
            if isinstance(batch, Tensor) and isinstance(self._trace.batch, Tensor):
                return self._of_other_shape(batch)
            raise MeasurementError(
                "All batches must be mappings with the same token streams as the first one; got a "
                f"{type(batch).__name__} without them or with others."
            )
        if self._mask is not None:
            return self._given(batch, streams)
        if (self._exclude or self._only_labeled) and not (streams and mapping is batch):
            raise MeasurementError(
                "exclude= and only_labeled= need batches that are mappings with input_ids and "
                f"labels; got {type(batch).__name__}. Give mask=lambda batch: … instead."
            )
        if self._only_labeled and all(stream.labels is None for stream in streams.values()):
            raise MeasurementError(
                "only_labeled= excludes tokens whose label is -100, so each batch needs labels of "
                "the same shape as its tokens; got none. Leave out only_labeled=."
            )
        counts = {
            name: counting(stream, name, self._exclude, self._only_labeled, self._skip_first)
            for name, stream in streams.items()
        }
        if not streams:
            self._require_sequences(batch)
            return Chosen(ids=ids_of(batch))
        is_needed = self._needs_order or any(each is not None for each in counts.values())
        try:
            ffns = self._traced(batch, streams).ffns
        except TraceError:
            if is_needed:
                raise
            return Chosen()  # all count, in any order
        if is_needed:
            self._require_tokens(ffns)
        masks = [None if each.stream is None else counts[each.stream] for each in ffns]
        orders = [_order(each, streams) if each.ran or is_needed else None for each in ffns]
        unpadded: dict[str, Tensor] = {}
        if self._exclude or self._only_labeled:  # otherwise all that do not count are padding
            for name, stream in streams.items():
                own = unpadded_of(stream)
                if own is None:
                    own = torch.ones(stream.sizes, dtype=torch.bool)
                unpadded[name] = without_first(own, self._skip_first)
        of_ffns = [None if each.stream is None else unpadded.get(each.stream) for each in ffns]
        return Chosen(masks, orders, *_tokens(ffns, streams), of_ffns)

    def _of_other_shape(self, batch: Tensor) -> Chosen:
        """The choice for a bare tensor that, unlike the first one, is not a batch of sequences."""
        if self._needs_order:
            raise MeasurementError(
                "skip_first= and groups= count positions, so every batch must contain sequences, "
                f"like the first one; got shape {tuple(batch.shape)}. Leave out these options."
            )
        return Chosen(None if self._mask is None else self._mask(batch))

    def _without_first(
        self, masks: Sequence[Tensor | None], unpadded: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The masks of all FFNs without the first positions after left padding; a mask that several
        of them share is changed once.

        Args:
            masks: the caller's.
            unpadded: for each, the batch's own mask, True for what is no padding; None if it has
                none.
        """
        own: dict[tuple[int, int], Tensor] = {}
        found = []
        for mask, its in zip(masks, unpadded, strict=True):
            key = id(mask), id(its)
            if mask is not None and key not in own:
                own[key] = without_first(mask, self._skip_first, its)
            found.append(own.get(key))
        return found

    def _given(self, batch: Any, streams: dict[str, Stream]) -> Chosen:
        """The caller's masks. Those that are `[sequence, position]` of a stream, also for the batch
        of the trace, are put into the order of the features; others are used as they are."""
        assert self._mask is not None
        ffns = self._probe.ffns
        given = self._mask(batch)
        masks = for_each(ffns, given)
        unpadded: list[Tensor | None] = [None] * len(ffns)
        of_all = isinstance(given, Tensor)
        if not streams:
            self._require_sequences(batch)
            return Chosen(self._without_first(masks, unpadded), ids=ids_of(batch))
        is_bare = as_mapping(batch) is not batch
        try:
            traced = self._traced(batch, streams)
        except TraceError:
            if (of_all and not is_bare) or self._needs_order:
                raise
            return Chosen(self._without_first(masks, unpadded))
        if self._needs_order:
            self._require_tokens(traced.ffns)
        of_trace = self._mask(traced.batch)
        if isinstance(of_trace, Tensor) != of_all and not self._needs_order:
            return Chosen(self._without_first(masks, unpadded))
        orders: list[Order | UnknownOrder | None] = []
        by_stream = {name: unpadded_of(stream) for name, stream in streams.items()}
        for index, (ffn, mask, short, place) in enumerate(
            zip(ffns, masks, for_each(ffns, of_trace), traced.ffns, strict=True)
        ):
            if mask is None:
                orders.append(_order(place, streams))
                continue
            stream = None if short is None else traced.stream_of(short)
            is_of_tokens = stream is not None and (stream == place.stream or not place.ran)
            if stream is not None and not is_of_tokens:
                raise MeasurementError(
                    f"A mask applies to one stream of tokens; {named(ffn)} receives another one. "
                    "Give one mask per stream: mask=lambda batch: "
                    "{name of the FFNs: its mask, or None}."
                )
            orders.append(_order(place, streams) if is_of_tokens else None)
            own = None if stream is None else by_stream[stream]
            if own is not None and own.shape == mask.shape:
                unpadded[index] = own
        ids, of_streams = _tokens(traced.ffns, streams)
        in_sequences = [
            order is not None and known for order, known in zip(orders, of_streams, strict=True)
        ]
        masks = self._without_first(masks, unpadded)
        skipped = self._without_first(unpadded, unpadded)
        return Chosen(masks, orders, ids, in_sequences, skipped)

    def _require_sequences(self, batch: Any) -> None:
        """Raises `TraceError` if positions are counted in a batch whose FFNs do not receive them
        sequence by sequence; looks at the first batch."""
        if not self._has_sequences:
            require_sequences(self._probe, self._run, batch)
            self._has_sequences = True

    def _require_tokens(self, ffns: Sequence[Traced]) -> None:
        """Raises `MeasurementError` for an FFN whose samples are neither the tokens of a stream nor
        independent of them: no mask shows which of them are padding, or where a sequence begins."""
        for ffn, place in zip(self._probe.ffns, ffns, strict=True):
            if place.is_other:
                raise MeasurementError(
                    "The mask of a batch has one value per token, as do skip_first= and groups=; "
                    f"{named(ffn)} receives another number of samples, which depends on that of "
                    "the tokens: more are added to them (registers, a prompt), or they are "
                    "downsampled. Give mask=lambda batch: …, True for the samples that count, in "
                    "the shape of the features, without skip_first= and groups=."
                )

    def _traced(self, batch: Any, streams: dict[str, Stream]) -> Trace:
        if self._trace is None:
            self._trace = trace(self._probe, self._run, batch, streams)
        return self._trace


def _without_cache(batch: Any) -> Any:
    """The batch without the key-value cache of a transformers model, such as from prefix tuning:
    cached tokens are not samples, and a pass that inspects the model would append to the cache.
    They come first in the attention mask."""
    caches = {
        name for name in _CACHES if isinstance(batch, Mapping) and batch.get(name) is not None
    }
    if not caches:
        return batch
    rest = {name: value for name, value in batch.items() if name not in caches}
    mask, streams = rest.get("attention_mask"), streams_of(rest, is_encoder_decoder=False)
    if isinstance(mask, Tensor) and mask.ndim == 2 and "" in streams:
        rest["attention_mask"] = mask[:, -streams[""].sizes[1] :]
    return rest


def _tokens(
    ffns: Sequence[Traced], streams: dict[str, Stream]
) -> tuple[list[Tensor | None], list[bool]]:
    """For each FFN, the tokens of its stream, and whether its samples belong to one."""
    ids = [None if each.stream is None else streams[each.stream].ids for each in ffns]
    return ids, [each.stream is not None for each in ffns]


def _order(place: Traced, streams: dict[str, Stream]) -> Order | UnknownOrder | None:
    if place.stream is None:
        return None if place.ran else UnknownOrder()
    return Order(*streams[place.stream].sizes, place.batch_first)


def call_measured(
    probe: Probe,
    choice: Choice,
    forward: Callable[[nn.Module, Any], object],
    model: nn.Module,
    batch: Any,
) -> object:
    """Runs the model on a batch that is measured, whose samples `choice.of` has chosen; raises as
    `call_probed` does, and for padding that it has not seen."""
    with nullcontext() if choice.shows_padding else hidden_padding_refused(model):
        return call_probed(probe, forward, model, batch)


def call_probed(
    probe: Probe, forward: Callable[[nn.Module, Any], object], model: nn.Module, batch: Any
) -> object:
    """Runs the model on a batch while the probe may record what depends on pre.

    Raises:
        MeasurementError: if recording makes the model fail.
    """
    try:
        return forward(model, batch)
    except RuntimeError as error:
        if not probe.is_recording:
            raise
        raise MeasurementError(
            "To see how post depends on pre, autograd records the operations in between, which "
            f"failed in this model: {error}. The usual cause is a tensor that is modified in place "
            "(mul_, inplace=True)."
        ) from error
