"""Which samples of an FFN's features a measurement takes, and how they are grouped."""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.accumulator import Side
from nerve.measuring.ffns import named, tokens_of
from nerve.measuring.groups import Divider, Division, Grouped
from nerve.measuring.masks import Chosen, Orders, fitted, for_each
from nerve.measuring.probe import Probe
from nerve.measuring.routing import counted_of

log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """The samples of one run of an FFN.

    Attributes:
        features: of each side, `[*samples, width]`, the same samples in the same order.
        mask: True for those that count, `[*samples]`; None where all do.
        divisions: how those that count are grouped, by grouping; None where they are not.
    """

    features: dict[Side, Tensor]
    mask: Tensor | None
    divisions: Mapping[str, Division] | None


class Samples:
    """Masks, skipped positions, the order of tokens and groups, forward pass by forward pass.

    Args:
        probe: gives the features, and the tokens of which an expert gets some.
        skip_first: leaves out so many positions at the beginning of each sequence.
        grouped: groups of the samples.
    """

    def __init__(self, probe: Probe, skip_first: int, grouped: Grouped) -> None:
        n = len(probe.ffns)
        self._probe = probe
        self._skip_first = skip_first
        self._divider = Divider(grouped, skip_first) if grouped.groupings else None
        self._longest: int | None = None
        self._masks: Sequence[Tensor | None] = [None] * n
        self._orders: Orders = [None] * n
        self._ids: Sequence[Tensor | None] = [None] * n
        self._in_sequences_known: Sequence[bool] = [True] * n
        self._divisions: dict[object, Mapping[str, Division]] = {}
        self._n_sequences = [0] * n
        self._n_sequences_now = [0] * n

    def start(self, chosen: Chosen) -> None:
        """Takes what belongs to the forward pass that comes; raises as `Measurement.start`."""
        n = len(self._probe.ffns)
        masks, orders, ids, in_sequences = chosen
        self._masks = for_each(self._probe.ffns, masks)
        self._orders = [None] * n if orders is None else orders
        self._ids = [ids] * n if ids is None or isinstance(ids, Tensor) else ids
        self._in_sequences_known = [True] * n if in_sequences is None else in_sequences
        self._divisions.clear()

    def finish_forward(self) -> None:
        """Ends one forward pass: the next one has other sequences."""
        for index, n in enumerate(self._n_sequences_now):
            self._n_sequences[index] += n
            self._n_sequences_now[index] = 0

    def require_positions(self) -> None:
        """Raises `MeasurementError` where `skip_first` has left no position of any sequence."""
        if self._longest is not None and self._longest <= self._skip_first:
            raise MeasurementError(
                "skip_first must leave positions to measure; got "
                f"skip_first={self._skip_first} of sequences of {self._longest} at most. Skip "
                "fewer, or give longer sequences."
            )

    def taken(self, index: int, inputs: Tensor, features: dict[Side, Tensor]) -> Taken:
        """Those of one run of an FFN.

        Args:
            index: of the FFN.
            inputs: what it gets, by which an expert's tokens are known.
            features: of each side, as the probe has them.

        Raises:
            MeasurementError: where mask, positions or groups do not fit the features.
        """
        where = named(self._probe.ffns[index])
        if tokens_of(self._probe.ffns[index]) is not None:
            if self._divider is not None:
                _say_not_grouped(where)
            samples = features["pre"].shape[:-1]
            return Taken(_in_shape(features, samples), self._counted_of(index, inputs), None)
        if (order := self._orders[index]) is not None:
            features = {side: order.sequences(each, where) for side, each in features.items()}
        samples = features["pre"].shape[:-1]
        features = _in_shape(features, samples)
        mask = self._mask(index, samples)
        divisions = self._divided(index, features["pre"], mask)
        features = {side: self._without_first(each) for side, each in features.items()}
        return Taken(features, self._mask_without_first(mask), divisions)

    def taken_around(self, index: int, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those at a site around an FFN, which are the FFN's, and their mask."""
        order = self._orders[index]
        if order is not None:
            features = order.sequences(features, named(self._probe.ffns[index]))
        mask = self._mask(index, features.shape[:-1])
        return self._without_first(features), self._mask_without_first(mask)

    def _mask(self, index: int, samples: torch.Size) -> Tensor | None:
        mask = self._masks[index]
        return None if mask is None else fitted(mask, samples, self._probe.ffns[index])

    def _without_first(self, features: Tensor) -> Tensor:
        """Without the first positions of each sequence, where these are skipped."""
        if not self._skip_first:
            return features
        if features.ndim < 3:
            raise MeasurementError(
                f"skip_first={self._skip_first} counts positions of sequences, so features must "
                f"have the shape [..., sequence, width]; got {tuple(features.shape)}. Measure a "
                "model that keeps its sequences apart, or leave skip_first out."
            )
        self._longest = max(self._longest or 0, features.shape[-2])
        return features[..., self._skip_first :, :]

    def _mask_without_first(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[..., self._skip_first :]

    def _divided(
        self, index: int, features: Tensor, mask: Tensor | None
    ) -> Mapping[str, Division] | None:
        """How the samples are grouped, where they are: on the device of the features."""
        if self._divider is None:
            return None
        where = named(self._probe.ffns[index])
        if not self._in_sequences_known[index]:
            _say_not_grouped(where)
            return None
        samples = features.shape[:-1]
        if len(samples) < 2:
            raise MeasurementError(
                "Groups are of sequences, so features must have the shape [..., sequence, width]; "
                f"those of {where} have {tuple(features.shape)}. Measure a model that keeps its "
                "sequences apart, or leave groups out."
            )
        sizes, per_sequence = (math.prod(samples[:-1]), samples[-1]), math.prod(samples[1:-1])
        self._n_sequences_now[index] = samples[0]
        ids, first = self._ids[index], self._n_sequences[index]
        key = (samples, id(self._masks[index]), id(ids), first, features.device)
        if key not in self._divisions:
            divisions = self._divider.divide(
                sizes, None if mask is None else mask.reshape(sizes), ids, first, per_sequence
            )
            self._divisions[key] = {
                grouping: Division(*(_moved(rows, features.device) for rows in division))
                for grouping, division in divisions.items()
            }
        return self._divisions[key]

    def _counted_of(self, index: int, inputs: Tensor) -> Tensor | None:
        """Which samples of an expert count: those of the tokens that do."""
        ffn, order = self._probe.ffns[index], self._orders[index]
        if self._masks[index] is None and not self._skip_first:
            return None
        tokens = self._probe.tokens_of(index)
        if tokens is None:
            raise MeasurementError(
                f"{named(ffn)} is described with a module whose input are its tokens; it ran, and "
                "the module did not. Check its description."
            )
        number = torch.arange(tokens[..., 0].numel(), device=tokens.device)
        number = number.reshape(*tokens.shape[:-1], 1)
        if order is not None:
            number = order.sequences(number, named(ffn))
        mask = self._mask(index, number.shape[:-1])
        kept = self._mask_without_first(None if mask is None else mask.to(tokens.device))
        number = self._without_first(number)
        number = number[..., 0] if kept is None else number[..., 0][kept]
        counts = torch.zeros(tokens[..., 0].numel(), dtype=torch.bool, device=tokens.device)
        counts[number.flatten()] = True
        return counted_of(inputs, tokens, counts, named(ffn))


def _in_shape(features: Mapping[Side, Tensor], samples: torch.Size) -> dict[Side, Tensor]:
    return {side: each.reshape(*samples, each.shape[-1]) for side, each in features.items()}


def _moved(rows: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {group: index.to(device, non_blocking=True) for group, index in rows.items()}


@cache
def _say_not_grouped(where: str) -> None:
    log.warning("%s is not grouped: its samples are no tokens in a known order", where)
