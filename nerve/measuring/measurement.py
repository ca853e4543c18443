"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.distributed import (
    gathered,
    reduce_covariance,
    reduce_shares,
    shared_from,
)
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.measuring.ffns import FFN, n_runs_of, named, sites_of
from nerve.measuring.masks import Masks, Orders, fitted, for_each
from nerve.measuring.probe import Probe
from nerve.measuring.sites import Site, n_inputs
from nerve.measuring.weights import affine_of, gives, is_unrounded
from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.covariance import Tally
from nerve.spectra.flag import Flag
from nerve.spectra.product import coarsest
from nerve.spectra.spread import Spread

Side = Literal["input", "pre", "post"]
"""What a covariance is of: what the FFN gets, or its features before and after the nonlinearity."""


class Measurement:
    """Accumulates the covariances of every FFN's features over forward passes.

    Between `start()` and `stop()` each forward pass of the model is measured; `finish_forward()`
    must follow each of them.

    Args:
        probe: taps the FFNs to measure; installed by the caller.
        shortcut: whether pre may be computed from the covariance of the FFN's input, C_pre =
            W C_x Wᵀ, where that is as exact and cheaper (float32 and float64 features).
        skip_first: leaves out so many positions at the beginning of each sequence.

    Raises:
        MeasurementError: for a `skip_first` that is no whole number from 0 on.
    """

    def __init__(self, probe: Probe, *, shortcut: bool = True, skip_first: int = 0) -> None:
        if isinstance(skip_first, bool) or not isinstance(skip_first, int) or skip_first < 0:
            raise MeasurementError(
                f"skip_first is a number of positions, 0 or more; got {skip_first!r}."
            )
        self._probe = probe
        self._shortcut = shortcut
        self._skip_first = skip_first
        self._masks: Sequence[Tensor | None] = [None] * len(probe.ffns)
        self._orders: Orders = [None] * len(probe.ffns)
        self._n_forwards = 0
        self._d_in: dict[int, int] = {}
        self._weights: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor | None] = {}
        self._of_input: set[int] = set()
        self._altered: set[int] = set()
        self._presumed: list[tuple[int, Flag]] = []
        self._covariances: dict[tuple[int, Side], StreamingCovariance] = {}
        self._shares: dict[tuple[int, Side], SampleShares] = {}

    def start(self, mask: Masks = None, orders: Orders | None = None) -> None:
        """Measures forward passes from now on.

        Args:
            mask: True or 1 for the samples that count (False or 0: padding), in the shape of the
                features without their last dimension, or flattened as they are; one for all FFNs or
                one for each.
            orders: for each FFN how the tokens of its stream lie in its features, where that is
                known; its mask is then `[n_sequences, n_positions]`.

        Raises:
            MeasurementError: for a mask with other values, or one that belongs to no FFN.
        """
        self._masks = for_each(self._probe.ffns, mask)
        self._orders = [None] * len(self._probe.ffns) if orders is None else orders
        self._probe.start(self._accumulate)

    def stop(self) -> None:
        """Stops measuring; allowed at any time."""
        self._probe.stop()

    def finish_forward(self) -> None:
        """Ends one forward pass; raises `MeasurementError` for an FFN that did not run as often as
        its description says."""
        self._probe.finish_forward()
        for index in {index for index, is_so in self._presumed if not is_so}:
            self._leave_weight(index)
        self._presumed.clear()
        self._n_forwards += 1

    def reduce(self) -> None:
        """Makes the measurement that of all processes' samples together: each process then has the
        eigenproblems of its share.

        Every process must call it; one may have measured nothing.
        """
        for index in set[int]().union(*gathered(self._altered)):
            self._leave_weight(index)
        seen = {key: (c.dim, c.tally()) for key, c in self._covariances.items()}
        lengths = {index: of.n_positions for (index, _), of in self._shares.items()}
        weights = {index: weight.dtype for index, weight in self._weights.items()}
        everyone = gathered((self._d_in, weights, self._of_input, seen, lengths))
        self._n_forwards = sum(gathered(self._n_forwards))
        tallies: dict[tuple[int, Side], list[Tally]] = defaultdict(list)
        n_positions: dict[int, list[int]] = defaultdict(list)
        for d_in, _, of_input, theirs, of_shares in everyone:
            for index, length in of_shares.items():
                n_positions[index].append(length)
            self._d_in |= d_in
            self._of_input |= of_input
            for (index, site), (dim, tally) in theirs.items():
                if (index, site) not in self._covariances:  # else it knows its device
                    self._covariance(index, site, dim, _device(self._probe.ffns[index]))
                tallies[index, site].append(tally)
        for index, site in sorted(tallies):
            covariance, to = self._covariances[index, site], index % len(everyone)
            counts = [tally.n for tally in tallies[index, site]]
            reduce_covariance(covariance, to, tallies[index, site])
            for of in ("pre", "post") if site == "post" else ():
                shares = self._shares_of(index, of, covariance.dim, covariance.device)
                reduce_shares(shares, to, counts, n_positions[index])
        self._share_weights([weights for _, weights, *_ in everyone])

    def _share_weights(self, holders: list[dict[int, torch.dtype]]) -> None:
        """Gives weights to the processes that saw no forward pass."""
        for index in sorted(set[int]().union(*holders)):
            if all(index in holder for holder in holders):
                continue
            owner = next(rank for rank, holder in enumerate(holders) if index in holder)
            weight = self._weights.get(index)
            if weight is None:
                post = self._covariances[index, "post"]
                weight = torch.empty(
                    (post.dim, self._d_in[index]), dtype=holders[owner][index], device=post.device
                )
            shared_from(owner, weight)
            self._weights[index] = weight

    def eigenproblems(self, share: int = 0, n_shares: int = 1) -> list[FFNEigenproblem]:
        """What is left to solve: one eigenproblem for each FFN, in the order given.

        Args:
            share, n_shares: of several processes, which one takes its share: every `n_shares`-th
                eigenproblem, from number `share` on.

        Raises:
            MeasurementError: if nothing was measured.
        """
        numbered = list(enumerate(self._probe.ffns))
        return [self._eigenproblem_of(index, ffn) for index, ffn in numbered[share::n_shares]]

    def spectra(self) -> list[FFNSpectra]:
        """Solves the eigenproblems, one after the other. Raises as `eigenproblems`."""
        return [eigenproblem.solve() for eigenproblem in self.eigenproblems()]

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        site = self._probe.sites[index][0]
        if index not in self._d_in:
            self._d_in[index] = n_inputs(site) or inputs.shape[-1]
            self._take_weight(index, site, inputs, pre)
        elif index in self._weights:
            self._compare_weight(index, site, inputs, pre)
        first: Side = "input" if index in self._of_input else "pre"
        features: dict[Side, Tensor] = {"input": inputs} if first == "input" else {}
        features |= {"pre": pre, "post": post}
        features, mask = self._in_sequences(index, features)
        if self._skip_first:
            features = {side: self._skipped(x) for side, x in features.items()}
            mask = None if mask is None else mask[..., self._skip_first :]
        spreads: dict[Side, Spread | None] = {"input": None}
        for side in ("pre", "post"):
            x = features[side]
            spreads[side] = self._shares_of(index, side, x.shape[-1], x.device).update(x, mask)
        for side in (first, "post"):
            x = features[side]
            covariance = self._covariance(index, side, x.shape[-1], x.device)
            covariance.update(x, mask, spreads[side])

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

    def _take_weight(self, index: int, site: Site, inputs: Tensor, pre: Tensor) -> None:
        """Notes W and b of `pre = W x + b`, where it is that."""
        affine = affine_of(site, inputs, pre)
        if affine is None:
            return
        # Copies: the optimizer may step before the eigenproblems are solved. Under autocast the
        # forward has used them rounded, as its outputs tell.
        weight = affine[0].to(pre.dtype, copy=True)
        bias = None if affine[1] is None else affine[1].to(pre.dtype, copy=True)
        self._weights[index], self._biases[index] = weight, bias
        if self._shortcut and is_unrounded(inputs, pre):
            self._of_input.add(index)
        self._presume(index, Flag(gives(weight, bias, inputs, pre)))

    def _compare_weight(self, index: int, site: Site, inputs: Tensor, pre: Tensor) -> None:
        """Leaves the weight of the first forward pass where this one used another, or more."""
        affine, noted = affine_of(site, inputs, pre), self._weights[index]
        if affine is None:
            self._leave_weight(index)
            return
        same = (affine[0].to(noted.dtype) == noted).all()
        self._presume(index, Flag(same & gives(noted, self._biases[index], inputs, pre)))

    def _presume(self, index: int, is_so: Flag) -> None:
        """Goes on as if the weight gave pre. Where the features are not taken by way of it, the
        answer is awaited at the end of the forward pass, so that the device does not run dry."""
        if index not in self._of_input:
            self._presumed.append((index, is_so))
        elif not is_so:
            self._leave_weight(index)

    def _leave_weight(self, index: int) -> None:
        """From now on measures pre itself; what was accumulated of the input is converted."""
        self._altered.add(index)
        weight, bias = self._weights.pop(index, None), self._biases.pop(index, None)
        if index in self._of_input:
            self._of_input.remove(index)
            of_input = self._covariances.pop((index, "input"), None)
            if of_input is not None:
                assert weight is not None
                self._covariances[index, "pre"] = of_input.projected(weight, bias)

    def _skipped(self, features: Tensor) -> Tensor:
        """Without the first positions of each sequence."""
        if features.ndim < 3:
            raise MeasurementError(
                f"skip_first={self._skip_first} counts positions of sequences, so features must "
                f"have the shape [..., sequence, width]; got {tuple(features.shape)}. Measure a "
                "model that keeps its sequences apart, or leave skip_first out."
            )
        return features[..., self._skip_first :, :]

    def _covariance(
        self, index: int, site: Side, dim: int, device: torch.device
    ) -> StreamingCovariance:
        key = (index, site)
        if key not in self._covariances:
            # The input's eigenproblem is small, and its rounding would be magnified by the weight.
            product = "float64" if site == "input" else None
            self._covariances[key] = StreamingCovariance(dim, device=device, product=product)
        return self._covariances[key]

    def _shares_of(self, index: int, site: Side, dim: int, device: torch.device) -> SampleShares:
        key = (index, site)
        if key not in self._shares:
            self._shares[key] = SampleShares(dim, device=device)
        return self._shares[key]

    def _eigenproblem_of(self, index: int, ffn: FFN) -> FFNEigenproblem:
        if (index, "post") not in self._covariances:
            self._add_nothing(index)
        weight, post = self._weights.get(index), self._covariances[index, "post"]
        of_input = index in self._of_input
        before = self._covariances[index, "input" if of_input else "pre"]
        return FFNEigenproblem(
            layer=ffn.layer,
            ffn=ffn.name,
            d_in=self._d_in[index],
            d_ff=post.dim,
            precision=coarsest([before.precision, post.precision]),
            n_samples=post.n_samples,
            before=before.scatter() if of_input else before.eigenproblem(),
            post=post.eigenproblem(),
            shares=torch.stack([self._shares[index, site].shares() for site in ("pre", "post")]),
            weight=weight,
            of_input=of_input,
            post_samples=None if weight is None else post.held_samples(),
        )

    def _add_nothing(self, index: int) -> None:
        """Makes an FFN that never ran, and need not, one without samples.

        Raises:
            MeasurementError: for one that should have run.
        """
        ffn, (pre, post) = self._probe.ffns[index], self._probe.sites[index]
        width, d_in = pre.width or post.width, n_inputs(pre)
        if not self._n_forwards or n_runs_of(ffn) is not None:
            raise MeasurementError(
                f"A measurement needs at least one forward pass; {named(ffn)} saw none. "
                "Give at least one batch."
            )
        if width is None or d_in is None:
            raise MeasurementError(
                f"{named(ffn)} never ran, and its modules do not say how wide it is. Leave it out, "
                "or give batches that reach it."
            )
        self._d_in[index] = d_in
        for side in ("pre", "post"):
            device = _device(ffn)
            self._covariance(index, side, width, device).update(torch.zeros(0, width))
            self._shares_of(index, side, width, device)


def _device(ffn: FFN) -> torch.device:
    pre, post = sites_of(ffn)
    return next(itertools.chain(pre.module.parameters(), post.module.parameters())).device
