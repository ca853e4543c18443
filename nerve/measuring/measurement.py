"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.accumulator import Accumulator, Pools, Side, eigenproblems, pools_of
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra, GroupEigenproblem
from nerve.measuring.ffns import named, tokens_of
from nerve.measuring.groups import NOT_GROUPED, Division, Grouped, GroupsOfFFNs
from nerve.measuring.masks import ALL, Chosen, Orders, fitted, for_each
from nerve.measuring.probe import Probe
from nerve.measuring.reduction import reduce
from nerve.measuring.routing import counted_of
from nerve.progress import Progress, unseen


class Measurement:
    """Accumulates the covariances of every FFN's features over forward passes.

    Between `start()` and `stop()` each forward pass of the model is measured; `finish_forward()`
    must follow each of them.

    Args:
        probe: taps the FFNs to measure; installed by the caller.
        shortcut: whether pre may be computed from the covariance of the FFN's input, C_pre =
            W C_x Wᵀ, where that is as exact and cheaper (float32 and float64 features); `projected`
            does so for 16-bit features, too, leaving out their own rounding if that is less than
            5e-5 of the variance; otherwise pre itself is used.
        skip_first: number of positions to skip at the beginning of each sequence.
        grouped: groups of the samples that are measured separately, too.
        sites: the sites to measure around the FFNs, some of `nerve.metric_names.AROUND`; the probe
            must tap them, except for `input`.
        pools: by layer and name, the pools of an earlier measurement, which are continued; new
            ones are added.
        open_pools: layer and name of pools that a later measurement continues: they have no
            eigenproblem yet.

    Raises:
        MeasurementError: for a `skip_first` that is not a nonnegative integer.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        shortcut: bool | str = True,
        skip_first: int = 0,
        grouped: Grouped = NOT_GROUPED,
        sites: Collection[str] = (),
        pools: Pools | None = None,
        open_pools: Collection[tuple[int, str]] = (),
    ) -> None:
        if type(skip_first) is not int or skip_first < 0:
            raise MeasurementError(
                f"skip_first must be a number of positions, 0 or more; got {skip_first!r}."
            )
        self._probe = probe
        self._samples = Samples(probe, skip_first, grouped)
        self._sites = sites
        self._has_parts = bool(grouped.groupings or sites)
        self._n_forwards = 0
        self._of = [Accumulator(ffn, shortcut=shortcut) for ffn in probe.ffns]
        self._pools = pools_of(self._of, {} if pools is None else pools)
        self._open_pools = open_pools
        self._is_pooled = False

    def start(self, chosen: Chosen = ALL) -> None:
        """Starts measuring forward passes, with the samples that count.

        Raises:
            MeasurementError: for a mask with values other than 0 and 1, or one without an FFN.
        """
        self._samples.start(chosen)
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
        self._samples.finish_forward()

    def require_positions(self) -> None:
        """Raises `MeasurementError` if `skip_first` leaves no position of any sequence."""
        self._samples.require_positions()

    def reduce(self) -> None:
        """Combines the samples of all processes; each process then has the eigenproblems of its
        share.

        Every process must call it, even one that has measured nothing.
        """
        self._n_forwards = reduce(self._rows(), self._n_forwards)

    def eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[FFNEigenproblem]:
        """The eigenproblems to solve: one for each FFN, in the order given, and one for each pool,
        after its last FFN.

        Args:
            share, n_shares: selects every `n_shares`-th eigenproblem, starting with number `share`,
                as the share of one of several processes.

        Raises:
            MeasurementError: if nothing was measured.
        """
        return eigenproblems(self._rows()[share::n_shares], self._n_forwards)

    def group_eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[GroupEigenproblem]:
        """The eigenproblems of groups and sites of the same FFNs. The arguments are those of
        `eigenproblems`."""
        if not self._has_parts:
            return []
        mine = self._rows()[share::n_shares]
        return [problem for each in mine for problem in each.group_eigenproblems()]

    @property
    def products(self) -> set[str]:
        """The products that were used for the covariances of all FFNs (`nerve.spectra.product`)."""
        covariances = [each for of in self._of for each in of.covariances.values()]
        return {name for covariance in covariances for name in covariance.products}

    def spectra(self, progress: Progress = unseen) -> list[FFNSpectra]:
        """Solves the eigenproblems, one after the other. Raises as `eigenproblems` does."""
        eigenproblems = self.eigenproblems()
        solved: list[FFNSpectra] = []
        for eigenproblem in eigenproblems:
            progress("eigenproblems", len(solved), len(eigenproblems))
            solved.append(eigenproblem.solve())
        return solved

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        of = self._of[index]
        of.see(inputs, pre)
        takes_input = self._takes_input(index)
        features: dict[Side, Tensor] = {"input": inputs} if of.of_input or takes_input else {}
        taken = self._samples.taken(index, inputs, features | {"pre": pre, "post": post})
        if takes_input:
            of.parts.add_site("input", taken.features["input"], taken.mask)
        of.add(*taken)
        if index in self._pools:
            self._pools[index].add_shares(taken.features, taken.mask)

    def _takes_input(self, index: int) -> bool:
        return "input" in self._sites and self._probe.sites[index][0].of == "output"

    def _take_site(self, index: int, name: str, features: Tensor) -> None:
        """Adds the features of a site around an FFN."""
        self._of[index].parts.add_site(name, *self._samples.taken_around(index, features))

    def _rows(self) -> list[Accumulator]:
        """The accumulators of FFNs and pools in the order of rows; pools are complete from the
        first call on."""
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


class Taken(NamedTuple):
    """The samples of one run of an FFN.

    Attributes:
        features: those of each side, `[*samples, width]`, the same samples in the same order.
        mask: True for the samples that count, `[*samples]`; None if all do.
        divisions: how the samples that count are grouped, by grouping; None if they are not.
    """

    features: dict[Side, Tensor]
    mask: Tensor | None
    divisions: Mapping[str, Division] | None


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

    def start(self, chosen: Chosen) -> None:
        """Takes the data of the next forward pass; raises as `Measurement.start` does."""
        masks, orders, ids, in_sequences = chosen
        self._masks = for_each(self._probe.ffns, masks)
        self._orders = [None] * len(self._masks) if orders is None else orders
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
        mask = self._mask(index, samples)
        divisions = None
        if self._groups is not None:
            divisions = self._groups.of(index, features["pre"], mask, self._masks[index])
        features = {side: self._without_first(each) for side, each in features.items()}
        return Taken(features, self._mask_without_first(mask), divisions)

    def taken_around(self, index: int, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """The samples at a site around an FFN, which are those of the FFN, and their mask."""
        features = self._in_order(index, features)
        mask = self._mask(index, features.shape[:-1])
        return self._without_first(features), self._mask_without_first(mask)

    def _in_order(self, index: int, features: Tensor) -> Tensor:
        """Sequence by sequence, where that is known. A part of a batch, as of a model that splits
        it, stays as it lies where all samples count alike."""
        order = self._orders[index]
        is_needed = self._masks[index] is not None or self._skip_first or self._groups is not None
        if order is None or not (is_needed or order.fits(features)):
            return features
        return order.sequences(features, named(self._probe.ffns[index]))

    def _mask(self, index: int, samples: torch.Size) -> Tensor | None:
        mask = self._masks[index]
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
