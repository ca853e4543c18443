"""The state of a measurement for one FFN: covariances, shares of samples, and the weight before
pre."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from nerve.errors import MeasurementError
from nerve.measuring.eigenproblem import FFNEigenproblem, GroupEigenproblem
from nerve.measuring.ffns import FFN, n_inputs, n_runs_of, named, sites_of
from nerve.measuring.groups import Division
from nerve.measuring.parts import Parts
from nerve.measuring.projection import (
    PROJECTED,
    is_rounded,
    is_rounding_small,
    not_affine,
    require_affine,
)
from nerve.measuring.weights import affine_of, gives, is_unrounded
from nerve.sites_and_groups import SITES
from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.host_copy import Flag
from nerve.spectra.moments import Spread
from nerve.spectra.product import coarsest, product_of_input
from nerve.spectra.shares import shares_of

Side = Literal["input", "pre", "post"]
"""The subject of a covariance: the FFN's input, or its features before and after the
nonlinearity."""


class Accumulator:
    """Accumulates the features of one FFN over its runs.

    Args:
        ffn: the FFN.
        shortcut: as in `Measurement`.

    Attributes:
        d_in: width of the FFN's input, summed over the FFNs of a pool; None before the first run.
        weight: W of pre = W x + b in the first run; None if it cannot be read or differs in other
            runs.
        of_input: whether the covariance of the input is accumulated instead of that of pre.
        altered: whether some run used more than the weight.
        took_pre: whether pre replaced the input, because its rounding was too large to leave out
            or because it is not computed from the weight alone.
        covariances: those of the input or pre, and of post.
        shares: those of pre and post.
        parts: covariances of groups of samples, and of sites around the FFN.
    """

    def __init__(self, ffn: FFN, *, shortcut: bool | str) -> None:
        self.ffn = ffn
        self.d_in: int | None = None
        self.weight: Tensor | None = None
        self.of_input = False
        self.altered = False
        self.took_pre = False
        self.covariances: dict[Side, StreamingCovariance] = {}
        self.shares: dict[Side, SampleShares] = {}
        self.parts = Parts()
        self._merging: str | None = None
        self._bias: Tensor | None = None
        self._pre, self._post = sites_of(ffn)
        self._shortcut = shortcut
        self._leaves_rounding = False
        self._assumed: list[Flag] = []

    @property
    def device(self) -> torch.device:
        """The device of the FFN's weights."""
        for site in (self._pre, self._post):
            for parameter in site.module.parameters():
                return parameter.device
        return torch.device("cpu")

    def see(self, inputs: Tensor, pre: Tensor) -> None:
        """Records what pre was computed from; call it at each run, before `add`.

        Args:
            inputs: the FFN's input, `[*samples, d_in]`.
            pre: its features before the nonlinearity, `[*samples, d_ff]`.

        Raises:
            MeasurementError: if pre is to be projected and cannot be.
        """
        if self.d_in is None:
            self.d_in = n_inputs(self._pre) or inputs.shape[-1]
            self._take_weight(inputs, pre)
        elif self.weight is not None:
            self._compare_weight(self.weight, inputs, pre)

    def add(
        self,
        features: Mapping[Side, Tensor],
        mask: Tensor | None,
        divisions: Mapping[str, Division] | None = None,
        unpadded: Tensor | None = None,
    ) -> None:
        """Adds the samples of a run.

        Args:
            features: the features of each side, `[*samples, width]`.
            mask: True for the samples that count.
            divisions: how the samples that count are grouped, by grouping; None or empty if they
                are not.
            unpadded: True for the samples that are no padding; None if all that do not count are.
        """
        # First, because covariances use the spread.
        spreads = self.add_shares(features, mask, unpadded)
        if (
            self.of_input
            and self._leaves_rounding
            and not is_rounding_small(features["pre"], spreads["pre"], divisions)
        ):
            self.take_pre()
        for side in self._sides:
            x = features[side]
            product = None
            if side == "input":
                assert self.weight is not None
                x = x.to(self.weight.dtype)  # the dtype of the multiplication
                product = product_of_input(x.dtype)
            if divisions:
                self.parts.add(side, x, divisions, product)
                self._merging = next(iter(divisions))
            else:
                covariance = self.covariance(side, x.shape[-1], x.device, product)
                covariance.update(x, mask, spreads.get(side))

    def add_shares(
        self, features: Mapping[Side, Tensor], mask: Tensor | None, unpadded: Tensor | None = None
    ) -> dict[Side, Spread | None]:
        """Adds the samples of a run to the shares only, and returns the spread of each side. The
        arguments are those of `add`."""
        return {
            side: self.sample_shares(side, x.shape[-1], x.device).update(x, mask, unpadded)
            for side, x in ((side, features[side]) for side in SITES)
        }

    def finish_forward(self) -> None:
        """Ends one forward pass: drops the weight if pre turned out not to be computed from it
        alone."""
        if not all(self._assumed):
            self.leave_weight()
        self._assumed.clear()

    def merge(self, other: "Accumulator") -> None:
        """Adds the covariances of another FFN's samples; shares are merged with `add_shares`.

        `d_in` adds up: each projection has its own input directions.
        """
        for side, covariance in other.covariances.items():
            if side == "input":
                assert other.weight is not None
                covariance = covariance.projected(other.weight, other._bias)
            of: Side = "post" if side == "post" else "pre"
            self.covariance(of, covariance.dim, covariance.device).merge(covariance)
        self.d_in = (self.d_in or 0) + (n_inputs(other._pre) or other.d_in or 0)

    def leave_weight(self) -> None:
        """Uses pre itself from now on, without a weight. Raises `MeasurementError` if pre is to be
        projected."""
        if self._leaves_rounding:
            raise not_affine(self.ffn)
        self.altered = True
        self.take_pre()
        self.weight = None

    def take_pre(self) -> None:
        """Uses pre itself from now on; what was accumulated from the input is converted."""
        if not self.of_input:
            return
        self.of_input, self.took_pre = False, True
        of_input = self.covariances.pop("input", None)
        if self.weight is not None:
            if of_input is not None:
                self.covariances["pre"] = of_input.projected(self.weight, self._bias)
            self.parts.project(self.weight, self._bias)

    def merge_groups(self) -> None:
        """Merges groups into the covariances of all samples; no more can be added then."""
        grouping, self._merging = self._merging, None
        if grouping is not None:
            for side in self._sides:
                merged = self.parts.merged(side, grouping, self.covariances.get(side))
                if merged is not None:
                    self.covariances[side] = merged

    def covariance(
        self, side: Side, dim: int, device: torch.device, product: str | None = None
    ) -> StreamingCovariance:
        """The covariance of one side, created without samples, accumulated with `product`."""
        if side not in self.covariances:
            self.covariances[side] = StreamingCovariance(dim, device=device, product=product)
        return self.covariances[side]

    def sample_shares(self, side: Side, dim: int, device: torch.device) -> SampleShares:
        """The shares of one side, created without samples."""
        if side not in self.shares:
            self.shares[side] = SampleShares(dim, device=device)
        return self.shares[side]

    def require_run(self, n_forwards: int) -> None:
        """Handles an FFN that never ran: it has no samples if it need not run.

        Args:
            n_forwards: number of measured forward passes.

        Raises:
            MeasurementError: if it should have run.
        """
        self.merge_groups()
        if "post" not in self.covariances:
            self._add_nothing(n_forwards)

    def eigenproblem(self, shares: Tensor) -> FFNEigenproblem:
        """The eigenproblem of an FFN, after `require_run`.

        Args:
            shares: as in `FFNEigenproblem`.
        """
        post = self.covariances["post"]
        before = self.covariances[self._sides[0]]
        assert self.d_in is not None
        return FFNEigenproblem(
            layer=self.ffn.layer,
            ffn=self.ffn.name,
            d_in=self.d_in,
            d_ff=post.dim,
            precision=coarsest([before.precision, post.precision]),
            n_samples=post.n_samples,
            before=before.scatter() if self.of_input else before.eigenproblem(),
            post=post.eigenproblem(),
            shares=shares,
            weight=self.weight,
            of_input=self.of_input,
            post_samples=None if self.weight is None else post.held_samples(),
        )

    def group_eigenproblems(self) -> list[GroupEigenproblem]:
        """The eigenproblems of groups and sites."""
        return list(self.parts.eigenproblems(self.ffn, self.weight if self.of_input else None))

    @property
    def _sides(self) -> tuple[Side, Side]:
        """The subjects whose covariances are accumulated."""
        return "input" if self.of_input else "pre", "post"

    def _take_weight(self, inputs: Tensor, pre: Tensor) -> None:
        """Records W and b if pre is `W x + b`."""
        affine = affine_of(self._pre, inputs, pre)
        leaves_rounding = self._shortcut == PROJECTED and is_rounded(pre)
        if affine is None:
            if leaves_rounding:
                require_affine(self.ffn, inputs, pre)
            return
        self._leaves_rounding = leaves_rounding
        # Copies: the optimizer may step before the eigenproblems are solved. Under autocast the
        # forward pass has rounded them to the dtype of its outputs.
        weight = affine[0].to(pre.dtype, copy=True)
        bias = None if affine[1] is None else affine[1].to(pre.dtype, copy=True)
        self.weight, self._bias = weight, bias
        self.of_input = leaves_rounding or (bool(self._shortcut) and is_unrounded(inputs, pre))
        self._assume(gives(weight, bias, inputs, pre))

    def _compare_weight(self, noted: Tensor, inputs: Tensor, pre: Tensor) -> None:
        """Drops the weight of the first run if this run used another one, or more than a weight."""
        affine = affine_of(self._pre, inputs, pre)
        if affine is None:
            self.leave_weight()
            return
        self._assume(Flag((affine[0].to(noted.dtype) == noted).all()))
        self._assume(gives(noted, self._bias, inputs, pre))

    def _assume(self, holds: Flag) -> None:
        """Assumes that pre was computed from the weight. Unless the choice between pre and the
        input depends on it, the check is read only after the forward pass, to avoid a GPU
        synchronization."""
        if not self.of_input or self._leaves_rounding:
            self._assumed.append(holds)
        elif not holds:
            self.leave_weight()

    def _add_nothing(self, n_forwards: int) -> None:
        """Gives an FFN that never ran, and need not, zero samples."""
        width, d_in = self._pre.width or self._post.width, n_inputs(self._pre)
        if not n_forwards or n_runs_of(self.ffn) is not None:
            raise MeasurementError(
                f"A measurement needs at least one forward pass; {named(self.ffn)} had none. Give "
                "at least one batch."
            )
        if width is None or d_in is None:
            raise MeasurementError(
                f"{named(self.ffn)} never ran, and its modules do not declare its width. Leave it "
                "out, or give batches that reach it."
            )
        self.d_in = self.d_in or d_in
        nothing = torch.zeros(0, width, device=self.device)
        self.add({"pre": nothing, "post": nothing}, None)


def eigenproblems(several: Sequence[Accumulator], n_forwards: int) -> list[FFNEigenproblem]:
    """The eigenproblem of each. Arguments and errors are those of `Accumulator.require_run`."""
    for each in several:
        each.require_run(n_forwards)
    shares = iter(shares_of([each.shares[side] for each in several for side in SITES]))
    return [each.eigenproblem(torch.stack([next(shares) for _ in SITES])) for each in several]
