"""Which samples of a forward pass are measured, and how they are arranged and grouped."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.accumulator import Side
from nerve.measuring.ffns import named, tokens_of
from nerve.measuring.groups import Division, Grouped, GroupsOfFFNs
from nerve.measuring.masks import Chosen, Orders, fitted, for_each
from nerve.measuring.probe import Probe
from nerve.measuring.routing import counted_of


class Taken(NamedTuple):
    """The samples of one run of an FFN.

    Attributes:
        features: those of each side, `[*samples, width]`, the same samples in the same order.
        mask: True for the samples that count, `[*samples]`; None if all do.
        divisions: how the samples that count are grouped, by grouping; None if they are not.
        unpadded: True for the samples that are no padding, `[*samples]`; None if all that do not
            count are.
    """

    features: dict[Side, Tensor]
    mask: Tensor | None
    divisions: Mapping[str, Division] | None
    unpadded: Tensor | None = None


class Samples:
    """Masks, skipped positions, the order of tokens, and groups of each forward pass.

    Args:
        probe: provides the features, and the tokens among which those of an expert are.
        skip_first: number of positions to skip at the beginning of each sequence.
        grouped: groups of the samples.
    """

    def __init__(self, probe: Probe, skip_first: int, grouped: Grouped) -> None:
        n = len(probe.ffns)
        self._probe = probe
        self._skip_first = skip_first
        self._groups = GroupsOfFFNs(grouped, skip_first, probe.ffns) if grouped.groupings else None
        self._longest: int | None = None
        self._masks: Sequence[Tensor | None] = [None] * n
        self._orders: Orders = [None] * n
        self._unpadded: Sequence[Tensor | None] = [None] * n

    def start(self, chosen: Chosen) -> None:
        """Takes the data of the next forward pass; raises as `Measurement.start` does."""
        masks, orders, ids, in_sequences, unpadded = chosen
        self._masks = for_each(self._probe.ffns, masks)
        self._orders = [None] * len(self._masks) if orders is None else orders
        self._unpadded = [None] * len(self._masks) if unpadded is None else unpadded
        if self._groups is not None:
            self._groups.start(ids, in_sequences)

    def finish_forward(self) -> None:
        """Ends one forward pass: the next one has different sequences."""
        if self._groups is not None:
            self._groups.finish_forward()

    def require_positions(self) -> None:
        """Raises `MeasurementError` if `skip_first` leaves no position of any sequence."""
        if self._longest is not None and self._longest <= self._skip_first:
            raise MeasurementError(
                f"skip_first must leave positions to measure; got skip_first={self._skip_first} "
                f"for sequences of at most {self._longest}. Skip fewer, or give longer sequences."
            )

    def taken(self, index: int, inputs: Tensor, features: dict[Side, Tensor]) -> Taken:
        """The samples of one run of an FFN.

        Args:
            index: the index of the FFN.
            inputs: its input, which identifies an expert's tokens.
            features: those of each side, from the probe.

        Raises:
            MeasurementError: if mask, positions or groups do not fit the features.
        """
        is_expert = tokens_of(self._probe.ffns[index]) is not None
        if not is_expert:
            features = {side: self._in_order(index, each) for side, each in features.items()}
        samples = features["pre"].shape[:-1]
        features = {side: each.reshape(*samples, each.shape[-1]) for side, each in features.items()}
        if is_expert:
            if self._groups is not None:
                self._groups.leave_out(index)
            return Taken(features, self._counted_of(index, inputs), None)
        mask, unpadded = (
            self._fitted(each[index], index, samples) for each in (self._masks, self._unpadded)
        )
        divisions = None
        if self._groups is not None:
            divisions = self._groups.of(index, features["pre"], mask, self._masks[index])
        features = {side: self._without_first(each) for side, each in features.items()}
        mask, unpadded = (self._mask_without_first(each) for each in (mask, unpadded))
        return Taken(features, mask, divisions, unpadded)

    def taken_around(self, index: int, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples at a site around an FFN, which are those of the FFN, and their mask."""
        features = self._in_order(index, features)
        mask = self._fitted(self._masks[index], index, features.shape[:-1])
        return self._without_first(features), self._mask_without_first(mask)

    def _in_order(self, index: int, features: Tensor) -> Tensor:
        """Sequence by sequence, if the order is known. A part of a batch, as in a model that splits
        it, is left in its order if all samples count alike."""
        order = self._orders[index]
        is_needed = self._masks[index] is not None or self._skip_first or self._groups is not None
        if order is None or not (is_needed or order.fits(features)):
            return features
        return order.sequences(features, named(self._probe.ffns[index]))

    def _fitted(self, mask: Tensor | None, index: int, samples: torch.Size) -> Tensor | None:
        return None if mask is None else fitted(mask, samples, self._probe.ffns[index])

    def _without_first(self, features: Tensor) -> Tensor:
        """Drops the first positions of each sequence if they are skipped."""
        if not self._skip_first:
            return features
        if features.ndim < 3:
            raise MeasurementError(
                f"skip_first={self._skip_first} counts positions of sequences, so features must "
                f"have the shape [..., sequence, width]; got {tuple(features.shape)}. Measure a "
                "model that does not flatten its sequences, or leave skip_first out."
            )
        self._longest = max(self._longest or 0, features.shape[-2])
        return features[..., self._skip_first :, :]

    def _mask_without_first(self, mask: Tensor | None) -> Tensor | None:
        return None if mask is None else mask[..., self._skip_first :]

    def _counted_of(self, index: int, inputs: Tensor) -> Tensor | None:
        """Which samples of an expert count: those of tokens that count."""
        ffn = self._probe.ffns[index]
        if self._masks[index] is None and not self._skip_first:
            return None
        tokens = self._probe.tokens_of(index)
        if tokens is None:
            raise MeasurementError(
                f"The description of {named(ffn)} names a module whose input is all its tokens; "
                "the FFN ran, and that module did not. Check the description."
            )
        counts = torch.zeros(tokens[..., 0].numel(), dtype=torch.bool, device=tokens.device)
        number = torch.arange(len(counts), device=tokens.device).reshape(*tokens.shape[:-1], 1)
        number, kept = self.taken_around(index, number)
        number = number[..., 0] if kept is None else number[..., 0][kept.to(tokens.device)]
        counts[number.flatten()] = True
        return counted_of(inputs, tokens, counts, named(ffn))
