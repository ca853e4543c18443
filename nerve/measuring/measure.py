"""`nerve.measure`: a model and batches to one row an FFN."""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import pandas as pd
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named
from nerve.measuring.find import find_ffns
from nerve.measuring.forward import call, evaluating
from nerve.measuring.masks import Masks, Order, Orders, UnknownOrder, for_each
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.measuring.streams import (
    Stream,
    Trace,
    Traced,
    TraceError,
    counting,
    is_encoder_decoder,
    streams_of,
    trace,
)
from nerve.outliers import outliers

log = logging.getLogger(__name__)


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Masks] | None = None,
    exclude: Collection[int] = (),
    only_labeled: bool = False,
    skip_first: int = 0,
    shortcut: bool = True,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches.
        batches: what `forward` takes; all of them make one measurement.
        ffns: descriptions of the FFNs; None for what `nerve.find_ffns` finds with the first batch.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        mask: gives a batch's mask, True (or 1) for the samples that count, in the shape of the
            features without their last dimension or flattened as they are: one for all FFNs, or one
            for each as a list or by the FFN's name; None counts all. By default the
            `attention_mask` and `decoder_attention_mask` of a mapping that has them, each for the
            FFNs that get those tokens.
        exclude: token ids that do not count, such as a tokenizer's `all_special_ids`; of the
            `input_ids` of a mapping.
        only_labeled: leaves out the tokens of a mapping whose `labels` are -100.
        skip_first: leaves out so many positions at the beginning of each sequence, which in many
            trained models hold most of the variance.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; False always takes the features themselves.

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, shares of the farthest sample, of the farthest 0.1% and of the mean, each _pre and
        _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and status. NaN
        where nothing can be measured, status says why. `outliers` names the sites whose spectrum
        may be that of a few samples.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or features, masks or descriptions
            that are not what they are said to be.
    """

    def run(batch: Any) -> object:
        try:
            return (forward or call)(model, batch)
        except RuntimeError as error:
            if not probe.is_recording:
                raise
            raise MeasurementError(
                "To see how post follows from pre, autograd records what happens in between; the "
                f"model does there what cannot be recorded: {error}. An overwritten tensor (mul_, "
                "inplace=True) is the usual cause."
            ) from error

    with evaluating(model):
        batches = iter(batches)
        if ffns is None:
            first = list(_first(batches))
            found = find_ffns(model, first[0] if first else None, forward=forward)
            log.info("FFNs to measure:\n%s", found)
            for line in found.unclear:
                log.warning("not measured; by hand, if it is an FFN: %s", line)
            ffns = found
            batches = chain(first, batches)
        probe = Probe(ffns)
        measurement = Measurement(probe, shortcut=shortcut, skip_first=skip_first)
        choice = _Choice(model, probe, run, mask, tuple(exclude), only_labeled, skip_first)
        probe.install()
        try:
            for batch in batches:
                measurement.start(*choice.of(batch))
                run(batch)
                measurement.finish_forward()
        finally:
            probe.remove()
    rows = pd.DataFrame([spectra.row() for spectra in measurement.spectra()])
    rows = rows.astype({name: float for name in rows if rows[name].isna().all()})
    return rows.assign(outliers=outliers(rows))


class _Choice:
    """Which samples of a batch count, for each FFN."""

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        run: Callable[[Any], object],
        mask: Callable[[Any], Masks] | None,
        exclude: Sequence[int],
        only_labeled: bool,
        skip_first: int,
    ) -> None:
        if mask is not None and (exclude or only_labeled):
            raise MeasurementError(
                "mask= says itself which samples count; exclude= and only_labeled= are for batches "
                "whose mask is not given. Leave them out, or mask=."
            )
        self._is_encoder_decoder = is_encoder_decoder(model)
        self._probe, self._run, self._mask = probe, run, mask
        self._exclude, self._only_labeled = exclude, only_labeled
        self._skips = skip_first > 0
        self._trace: Trace | None = None

    def of(self, batch: Any) -> tuple[Masks, Orders | None]:
        """Masks and orders, as `Measurement.start` takes them."""
        streams = streams_of(batch, is_encoder_decoder=self._is_encoder_decoder)
        if self._trace is not None and self._trace.lengths.keys() != streams.keys():
            raise MeasurementError(
                "All batches must be mappings of the same streams of tokens, as the first one is; "
                f"got a {type(batch).__name__} without, or with other ones."
            )
        if self._mask is not None:
            return self._given(batch, streams)
        if (self._exclude or self._only_labeled) and not streams:
            raise MeasurementError(
                "exclude= and only_labeled= need batches that are mappings with input_ids and "
                f"labels; got {type(batch).__name__}. Give mask=lambda batch: … instead."
            )
        if self._only_labeled and all(stream.labels is None for stream in streams.values()):
            raise MeasurementError(
                "only_labeled= leaves out tokens whose labels are -100, so that a batch must have "
                "labels of the shape of its tokens; it has none. Leave out only_labeled=."
            )
        counts = {
            name: counting(stream, name, self._exclude, self._only_labeled)
            for name, stream in streams.items()
        }
        if not streams:
            return None, None
        is_needed = self._skips or any(each is not None for each in counts.values())
        try:
            ffns = self._traced(batch, streams).ffns
        except TraceError:
            if is_needed:
                raise
            return None, None  # all count, in whatever order
        masks = [None if each.stream is None else counts[each.stream] for each in ffns]
        return masks, [_order(each, streams) if each.ran or is_needed else None for each in ffns]

    def _given(self, batch: Any, streams: dict[str, Stream]) -> tuple[Masks, Orders | None]:
        """Masks that the caller gives. Those that are `[sequence, position]` of a stream, also for
        the batch of the trace, are put into the order of the features; any other is taken as it
        lies."""
        assert self._mask is not None
        ffns = self._probe.ffns
        given = self._mask(batch)
        masks = for_each(ffns, given)
        of_all = isinstance(given, Tensor)
        if not streams:
            return masks, None
        try:
            traced = self._traced(batch, streams)
        except TraceError:
            if of_all:
                raise
            return masks, None
        of_trace = self._mask(traced.batch)
        if isinstance(of_trace, Tensor) != of_all:
            return masks, None
        orders: list[Order | UnknownOrder | None] = []
        for ffn, mask, short, place in zip(
            ffns, masks, for_each(ffns, of_trace), traced.ffns, strict=True
        ):
            stream = None if short is None else traced.stream_of(short)
            is_of_tokens = stream is not None and (stream == place.stream or not place.ran)
            if stream is not None and mask is not None and not is_of_tokens:
                raise MeasurementError(
                    f"A mask belongs to the tokens that it was made for; {named(ffn)} gets others. "
                    "Give one for each: mask=lambda batch: {name of the FFNs: its mask, or None}."
                )
            orders.append(_order(place, streams) if is_of_tokens else None)
        return masks, orders

    def _traced(self, batch: Any, streams: dict[str, Stream]) -> Trace:
        if self._trace is None:
            self._trace = trace(self._probe, self._run, batch, streams)
        return self._trace


def _order(place: Traced, streams: dict[str, Stream]) -> Order | UnknownOrder | None:
    if place.stream is None:
        return None if place.ran else UnknownOrder()
    return Order(*streams[place.stream].sizes, place.batch_first)


def _first(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield batch
        return
