"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.accumulator import Accumulator, Pools, Side, pools_of
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.measuring.ffns import named, tokens_of
from nerve.measuring.group_spectra import GroupEigenproblem
from nerve.measuring.groups import NOT_GROUPED, Divider, Division, Grouped
from nerve.measuring.masks import Masks, Orders, fitted, for_each
from nerve.measuring.probe import Probe
from nerve.measuring.reduction import reduce
from nerve.measuring.routing import counted_of
from nerve.progress import Progress, unseen

log = logging.getLogger(__name__)


class Measurement:
    """Accumulates the covariances of every FFN's features over forward passes.

    Between `start()` and `stop()` each forward pass of the model is measured; `finish_forward()`
    must follow each of them.

    Args:
        probe: taps the FFNs to measure; installed by the caller.
        shortcut: whether pre may be computed from the covariance of the FFN's input, C_pre =
            W C_x Wᵀ, where that is as exact and cheaper (float32 and float64 features).
        skip_first: leaves out so many positions at the beginning of each sequence.
        grouped: groups of the samples that are measured by themselves, too.
        sites: what is measured around the FFNs, some of `nerve.metric_names.AROUND`; the probe must
            tap them, but for `input`.
        pools: by layer and name the pools of an earlier measurement, which go on; those that begin
            here are added.
        open_pools: layer and name of pools that a later measurement goes on with: they have no
            eigenproblem yet.

    Raises:
        MeasurementError: for a `skip_first` that is no whole number from 0 on.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        shortcut: bool = True,
        skip_first: int = 0,
        grouped: Grouped = NOT_GROUPED,
        sites: Collection[str] = (),
        pools: Pools | None = None,
        open_pools: Collection[tuple[int, str]] = (),
    ) -> None:
        if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
            raise MeasurementError(
                f"skip_first is a number of positions, 0 or more; got {skip_first!r}."
            )
        self._probe = probe
        self._skip_first = skip_first
        self._longest: int | None = None
        self._masks: Sequence[Tensor | None] = [None] * len(probe.ffns)
        self._orders: Orders = [None] * len(probe.ffns)
        self._ids: Sequence[Tensor | None] = [None] * len(probe.ffns)
        self._in_sequences_known: Sequence[bool] = [True] * len(probe.ffns)
        self._divider = Divider(grouped, skip_first) if grouped.groupings else None
        self._divisions: dict[object, Mapping[str, Division]] = {}
        self._n_sequences = [0] * len(probe.ffns)
        self._n_sequences_now = [0] * len(probe.ffns)
        self._sites = sites
        self._n_forwards = 0
        self._of = [Accumulator(ffn, shortcut=shortcut) for ffn in probe.ffns]
        self._pools = pools_of(self._of, {} if pools is None else pools)
        self._open_pools = open_pools
        self._is_pooled = False

    def start(
        self,
        mask: Masks = None,
        orders: Orders | None = None,
        ids: Tensor | Sequence[Tensor | None] | None = None,
        in_sequences: Sequence[bool] | None = None,
    ) -> None:
        """Measures forward passes from now on.

        Args:
            mask: True or 1 for the samples that count (False or 0: padding), in the shape of the
                features without their last dimension, or flattened as they are; one for all FFNs or
                one for each.
            orders: for each FFN how the tokens of its stream lie in its features, where that is
                known; its mask is then `[n_sequences, n_positions]`.
            ids: the tokens that the samples are of, `[n_sequences, n_positions]`, of all FFNs or of
                each; groups by frequency need them.
            in_sequences: whether the samples of each FFN are those of sequences; those of others
                are not grouped. By default all are.

        Raises:
            MeasurementError: for a mask with other values, or one that belongs to no FFN.
        """
        n = len(self._probe.ffns)
        self._masks = for_each(self._probe.ffns, mask)
        self._orders = [None] * n if orders is None else orders
        self._ids = [ids] * n if ids is None or isinstance(ids, Tensor) else ids
        self._in_sequences_known = [True] * n if in_sequences is None else in_sequences
        self._divisions.clear()
        self._probe.start(self._accumulate, self._take_site if self._sites else None)

    def stop(self) -> None:
        """Stops measuring; allowed at any time."""
        self._probe.stop()

    def finish_forward(self) -> None:
        """Ends one forward pass; raises `MeasurementError` for an FFN that did not run as often as
        its description says."""
        self._probe.finish_forward()
        for of in self._of:
            of.finish_forward()
        self._n_forwards += 1
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

    def reduce(self) -> None:
        """Makes the measurement that of all processes' samples together: each process then has the
        eigenproblems of its share.

        Every process must call it; one may have measured nothing.
        """
        self._n_forwards = reduce(self._rows(), self._n_forwards)

    def eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[FFNEigenproblem]:
        """What is left to solve: one eigenproblem for each FFN, in the order given, and one for
        each pool, after its last FFN.

        Args:
            share, n_shares: of several processes, which one takes its share: every `n_shares`-th
                eigenproblem, from number `share` on.

        Raises:
            MeasurementError: if nothing was measured.
        """
        mine = self._rows()[share::n_shares]
        return [each.eigenproblem(n_forwards=self._n_forwards) for each in mine]

    def group_eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[GroupEigenproblem]:
        """What is left to solve of groups and sites, of the same FFNs. Arguments as of
        `eigenproblems`."""
        mine = self._rows()[share::n_shares]
        return [problem for each in mine for problem in each.group_eigenproblems()]

    @property
    def n_bytes(self) -> int:
        """Memory of the covariances, of groups and sites among them, at most."""
        held = [c for each in self._of for c in each.parts.covariances.values()]
        held += [c for each in self._of for c in each.covariances.values()]
        return sum(8 * covariance.dim**2 for covariance in held)

    def spectra(self, progress: Progress = unseen) -> list[FFNSpectra]:
        """Solves the eigenproblems, one after the other. Raises as `eigenproblems`."""
        eigenproblems = self.eigenproblems()
        solved: list[FFNSpectra] = []
        for eigenproblem in eigenproblems:
            progress("eigenproblems", len(solved), len(eigenproblems))
            solved.append(eigenproblem.solve())
        return solved

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        self._of[index].see(inputs, pre)
        features: dict[Side, Tensor] = {"input": inputs} if self._of[index].of_input else {}
        features |= {"pre": pre, "post": post}
        divisions = None
        if tokens_of(self._probe.ffns[index]) is None:
            features, mask = self._in_sequences(index, features)
            divisions = self._divided(index, features["pre"], mask)
            if self._skip_first:
                features = {side: self._skipped(x) for side, x in features.items()}
                mask = None if mask is None else mask[..., self._skip_first :]
            if self._takes_input(index):
                self._take_site(index, "input", inputs)
        else:
            samples = pre.shape[:-1]
            features = {side: x.reshape(*samples, x.shape[-1]) for side, x in features.items()}
            mask = self._counted_of(index, inputs)
            if self._divider is not None:
                _say_not_grouped(named(self._probe.ffns[index]))
            if self._takes_input(index):
                x = inputs.reshape(*samples, inputs.shape[-1])
                self._of[index].parts.add_site("input", x, mask)
        self._of[index].add(features, mask, divisions)
        if index in self._pools:
            self._pools[index].add_shares(features, mask)

    def _takes_input(self, index: int) -> bool:
        return "input" in self._sites and self._probe.sites[index][0].of == "output"

    def _take_site(self, index: int, name: str, features: Tensor) -> None:
        """Adds what there is at a site around an FFN, whose samples are those of the FFN."""
        order, mask = self._orders[index], self._masks[index]
        if order is not None:
            features = order.sequences(features, named(self._probe.ffns[index]))
        if mask is not None:
            mask = fitted(mask, features.shape[:-1], self._probe.ffns[index])
        if self._skip_first:
            features = self._skipped(features)
            mask = None if mask is None else mask[..., self._skip_first :]
        self._of[index].parts.add_site(name, features, mask)

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
        ffn, order, mask = self._probe.ffns[index], self._orders[index], self._masks[index]
        if mask is None and not self._skip_first:
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
        kept = None if mask is None else fitted(mask, number.shape[:-1], ffn).to(tokens.device)
        if self._skip_first:
            number = self._skipped(number)
            kept = None if kept is None else kept[..., self._skip_first :]
        number = number[..., 0] if kept is None else number[..., 0][kept]
        counts = torch.zeros(tokens[..., 0].numel(), dtype=torch.bool, device=tokens.device)
        counts[number.flatten()] = True
        return counted_of(inputs, tokens, counts, named(ffn))

    def _rows(self) -> list[Accumulator]:
        """Those of FFNs and pools, as rows go; the pools are whole from the first call on."""
        pools = [
            pool
            for pool in dict.fromkeys(self._pools.values())
            if (pool.ffn.layer, pool.ffn.name) not in self._open_pools
        ]
        last = {pool: index for index, pool in self._pools.items()}
        if not self._is_pooled:
            self._is_pooled = True
            for each in self._of:
                each.merge_groups()
            for index, pool in self._pools.items():
                pool.merge(self._of[index])
        rows: list[Accumulator] = []
        for index, each in enumerate(self._of):
            rows.append(each)
            rows += [pool for pool in pools if last[pool] == index]
        return rows

    def _in_sequences(
        self, index: int, features: dict[Side, Tensor]
    ) -> tuple[dict[Side, Tensor], Tensor | None]:
        """The features `[*, sequence, width]` of the same samples in the same order, and their
        mask."""
        ffn, order, mask = self._probe.ffns[index], self._orders[index], self._masks[index]
        if order is not None:
            features = {side: order.sequences(each, named(ffn)) for side, each in features.items()}
        samples = features["pre"].shape[:-1]
        features = {side: x.reshape(*samples, x.shape[-1]) for side, x in features.items()}
        return features, None if mask is None else fitted(mask, samples, ffn)

    def _skipped(self, features: Tensor) -> Tensor:
        """Without the first positions of each sequence."""
        if features.ndim < 3:
            raise MeasurementError(
                f"skip_first={self._skip_first} counts positions of sequences, so features must "
                f"have the shape [..., sequence, width]; got {tuple(features.shape)}. Measure a "
                "model that keeps its sequences apart, or leave skip_first out."
            )
        self._longest = max(self._longest or 0, features.shape[-2])
        return features[..., self._skip_first :, :]


def _moved(rows: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {group: index.to(device, non_blocking=True) for group, index in rows.items()}


@cache
def _say_not_grouped(where: str) -> None:
    log.warning("%s is not grouped: its samples are no tokens in a known order", where)
