"""Groups of samples: by position in the sequence, by token frequency, by halves.

The samples of a forward pass are divided on the host, once for all FFNs that share them: an index
of rows for each group, with which the features of every FFN are then selected.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named
from nerve.sites_and_groups import GROUPINGS

log = logging.getLogger(__name__)

REST = "rest"
"""The group of the samples that count and are in no other group; it has no row."""

OVERLAPPING = ("like_0",)
"""Groups whose samples are also in other groups of their grouping."""

_COUNTED = -1
_NOT_COUNTED = -2

_EQUAL = {"position": ("q1", "q2", "q3", "q4"), "frequency": GROUPINGS["frequency"]}
"""The groups that get equal numbers of samples in every forward pass. Halves differ by one sequence
at most, and position 0 has one sample per sequence."""

_GOLDEN = 0.6180339887498949
"""The fractional parts of its multiples are spread evenly in [0, 1)."""


@dataclass(frozen=True)
class Grouped:
    """The groups that are measured in addition to all samples.

    Attributes:
        groupings: keys of `GROUPINGS`, each once.
        token_counts: occurrences of each token id in the training text; needed for `frequency`.

    Raises:
        MeasurementError: for an unknown grouping, or `frequency` without counts.
    """

    groupings: tuple[str, ...] = ()
    token_counts: Int64[Tensor, " vocab"] | None = None

    def __post_init__(self) -> None:
        for name in self.groupings:
            if name not in GROUPINGS or self.groupings.count(name) > 1:
                raise MeasurementError(
                    f"groups must be among {', '.join(GROUPINGS)}, each at most once; got "
                    f"{', '.join(map(str, self.groupings))}."
                )
        if "frequency" in self.groupings and self.token_counts is None:
            raise MeasurementError(
                "Groups by frequency need token_counts, the number of occurrences of each token "
                "id; got none. Give them, or leave frequency out of groups."
            )

    @property
    def n_matrices(self) -> int:
        """Number of covariances for each side of an FFN: those of all groups and the rest of the
        first grouping; without groups, the one of all samples."""
        return sum(len(GROUPINGS[name]) for name in self.groupings) + 1


NOT_GROUPED = Grouped()


class Division(NamedTuple):
    """The rows of each group of a grouping, among the `[n_sequences · n_positions]` samples of one
    forward pass.

    Attributes:
        parts: rows of disjoint groups, including `REST`; together all samples that count.
        others: rows of groups whose samples are in `parts`, too.
    """

    parts: dict[str, Int64[Tensor, " n"]]
    others: dict[str, Int64[Tensor, " n"]]


def frequency_classes(counts: Int64[Tensor, " vocab"]) -> Int64[Tensor, " vocab"]:
    """The third of all occurrences that each token belongs to: 0 for the most frequent tokens, 2
    for the least frequent.

    A token is classified by where the occurrences of more frequent ones end; among equally frequent
    tokens, the lower id comes first. Tokens that never occur are in the last third.
    """
    counts = counts.detach().to("cpu", torch.float64)
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    total = counts.sum().clamp(min=1)
    classes = torch.full_like(order, 2)
    classes[order] = (3 * before / total).long().clamp(max=2)
    classes[counts == 0] = 2
    return classes


class Divider:
    """Divides the samples of forward passes.

    Args:
        grouped: the groups.
        skip_first: number of positions skipped at the beginning of each sequence; position 0 is
            then not a group.
    """

    def __init__(self, grouped: Grouped, skip_first: int = 0) -> None:
        self._groupings = grouped.groupings
        self._skip_first = skip_first
        counts = grouped.token_counts
        self._classes = None if counts is None else frequency_classes(counts)

    def divide(
        self,
        sizes: tuple[int, int],
        mask: Bool[Tensor, "sequences positions"] | None,
        ids: Int64[Tensor, "sequences positions"] | None,
        first: int,
        per_sequence: int = 1,
    ) -> Mapping[str, Division]:
        """The rows of each group, by grouping, on the host.

        Args:
            sizes: number of sequences and of positions, including skipped ones.
            mask: True for the samples that count, before any are skipped.
            ids: the tokens; needed for `frequency`.
            first: index of the first sequence, continuing from earlier forward passes.
            per_sequence: how many of `sizes[0]` belong to one sequence, such as the rows of an
                image.

        Raises:
            MeasurementError: for missing tokens, or tokens of the wrong shape.
        """
        mask = torch.ones(sizes, dtype=torch.bool) if mask is None else mask.cpu()
        # Padding may come first, and prompts that do not count: positions start at the first sample
        # that counts, or before it by those skipped.
        start = torch.where(mask.any(1), mask.int().argmax(1), 0)[:, None]
        start = (start - self._skip_first).clamp(min=0)
        position = torch.arange(sizes[1])[None]
        place = position - start
        counts = mask & (position >= self._skip_first)
        number = (first + torch.arange(sizes[0]) // per_sequence)[:, None]
        given = {}
        for grouping in self._groupings:
            others: dict[str, Tensor] = {}
            if grouping == "position":
                labels = self._quarters(place, sizes[1])
                if not self._skip_first:
                    others["like_0"] = self._rows(_one_other(counts, place, number))
            elif grouping == "frequency":
                labels = self._classes_of(ids, sizes)
            else:
                labels = (number % 2).expand(sizes)
            left_out = (*OVERLAPPING, "0") if self._skip_first else OVERLAPPING
            names = [name for name in GROUPINGS[grouping] if name not in left_out]
            labels = torch.where(counts, labels, _NOT_COUNTED)
            parts = {name: self._rows(labels == i) for i, name in enumerate(names)}
            parts[REST] = self._rows(labels == _COUNTED)
            given[grouping] = Division(_equalized(parts, _EQUAL.get(grouping, ())), others)
        return given

    def _quarters(self, place: Tensor, n_positions: int) -> Tensor:
        """0 for position 0, then four equal parts of the other positions; only the latter if
        position 0 is not a group."""
        first = max(self._skip_first, 1)
        quarter = ((place - first) * 4).div(max(n_positions - first, 1), rounding_mode="floor")
        quarter = quarter.clamp(0, 3)
        return quarter if self._skip_first else torch.where(place == 0, 0, 1 + quarter)

    def _classes_of(self, ids: Tensor | None, sizes: tuple[int, int]) -> Tensor:
        assert self._classes is not None
        if ids is None or tuple(ids.shape) != sizes:
            raise MeasurementError(
                "Groups by frequency need the token of each sample, "
                f"{sizes}; got {'none' if ids is None else tuple(ids.shape)}. Give batches that "
                "are mappings with input_ids, or leave frequency out of groups."
            )
        # An id that was never counted is rare.
        ids = ids.detach().cpu().long()
        known = (ids >= 0) & (ids < len(self._classes))
        return torch.where(known, self._classes[torch.where(known, ids, 0)], 2)

    def _rows(self, chosen: Bool[Tensor, "sequences positions"]) -> Int64[Tensor, " n"]:
        """The indices of the chosen samples among those that are not skipped."""
        return chosen[:, self._skip_first :].reshape(-1).nonzero()[:, 0]


class GroupsOfFFNs:
    """The grouping of each FFN's samples in each forward pass.

    Args:
        grouped, skip_first: as of `Divider`.
        ffns: the FFNs.
    """

    def __init__(self, grouped: Grouped, skip_first: int, ffns: Sequence[FFN]) -> None:
        self._divider = Divider(grouped, skip_first)
        self._ffns = ffns
        self._ids: Sequence[Tensor | None] = [None] * len(ffns)
        self._in_sequences: Sequence[bool] = [True] * len(ffns)
        self._divisions: dict[object, Mapping[str, Division]] = {}
        self._n_sequences = [0] * len(ffns)
        self._n_sequences_now = [0] * len(ffns)

    def start(
        self, ids: Tensor | Sequence[Tensor | None] | None, in_sequences: Sequence[bool] | None
    ) -> None:
        """Takes the data of the next forward pass, as in `Chosen`."""
        n = len(self._ffns)
        self._ids = [ids] * n if ids is None or isinstance(ids, Tensor) else ids
        self._in_sequences = [True] * n if in_sequences is None else in_sequences
        self._divisions.clear()

    def finish_forward(self) -> None:
        """Ends one forward pass: the next one has different sequences."""
        for index, n in enumerate(self._n_sequences_now):
            self._n_sequences[index] += n
            self._n_sequences_now[index] = 0

    def of(
        self, index: int, features: Tensor, mask: Tensor | None, given: Tensor | None
    ) -> Mapping[str, Division] | None:
        """The divisions by grouping, on the device of the features `[..., sequence, width]`; None
        if these are not sequences. `mask` is that of the samples, `given` the one that FFNs
        share."""
        if not self._in_sequences[index]:
            self.leave_out(index)
            return None
        samples = features.shape[:-1]
        if len(samples) < 2:
            raise MeasurementError(
                "Groups need sequences, so features must have the shape [..., sequence, width]; "
                f"those of {named(self._ffns[index])} have {tuple(features.shape)}. Measure a "
                "model that does not flatten its sequences, or leave groups out."
            )
        sizes, per_sequence = (math.prod(samples[:-1]), samples[-1]), math.prod(samples[1:-1])
        self._n_sequences_now[index] = samples[0]
        ids, first = self._ids[index], self._n_sequences[index]
        key = (samples, id(given), id(ids), first, features.device)
        if key not in self._divisions:
            divisions = self._divider.divide(
                sizes, None if mask is None else mask.reshape(sizes), ids, first, per_sequence
            )
            self._divisions[key] = {
                grouping: _moved(division, features.device)
                for grouping, division in divisions.items()
            }
        return self._divisions[key]

    def leave_out(self, index: int) -> None:
        """Logs, once, that an FFN is not grouped."""
        _say_not_grouped(named(self._ffns[index]))


def _moved(division: Division, device: torch.device) -> Division:
    parts, others = (
        {name: rows.to(device, non_blocking=True) for name, rows in groups.items()}
        for groups in division
    )
    return Division(parts, others)


@cache
def _say_not_grouped(where: str) -> None:
    log.warning("%s is not grouped: its samples are not tokens in a known order", where)


def _one_other(
    counts: Bool[Tensor, "sequences positions"], place: Tensor, number: Tensor
) -> Bool[Tensor, "sequences positions"]:
    """For each sequence whose position 0 counts, one other sample, at places spread evenly over the
    sequences."""
    later = counts & (place > 0)
    n_later = later.sum(1, keepdim=True)
    chosen = (number * _GOLDEN % 1 * n_later).long() + 1
    has_first = (counts & (place == 0)).any(1, keepdim=True)
    return later & (later.cumsum(1) == chosen) & has_first


def _equalized(parts: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """As many rows of each of these groups as the smallest of them has, evenly spread; the others
    become part of the rest."""
    if not names:
        return parts
    least = min(len(parts[name]) for name in names)
    left = [parts[REST]]
    for name in names:
        rows = parts[name]
        keeps = torch.zeros(len(rows), dtype=torch.bool)
        keeps[torch.arange(least) * len(rows) // max(least, 1)] = True
        parts[name] = rows[keeps]
        left.append(rows[~keeps])
    return parts | {REST: torch.cat(left)}
