"""The eigenproblems of a measurement, of FFNs and of groups of samples and sites, and the spectra
that solve them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nerve.metric_names import STORED
from nerve.sites_and_groups import POOLED
from nerve.spectra import Shares, eigenvalues, projected_eigenvalues, variance_outside
from nerve.spectra.metrics import OF_A_GROUP, OF_ONE_SPECTRUM, OF_TWO_SPECTRA

TOO_FEW_SAMPLES = "too_few_samples"
"""The status with fewer than two samples."""

WHY_NULL: Mapping[str, Callable[[Tensor], bool]] = {
    "non_finite": lambda spectrum: not bool(torch.isfinite(spectrum).all()),
    "zero_variance": lambda spectrum: not bool(spectrum.sum() > 0),
}
"""Reasons why a spectrum cannot be measured, each with a check."""


ROW: Mapping[str, type] = {
    "layer": int,
    "ffn": str,
    **dict.fromkeys(("n_samples", "d_ff", "d_in"), int),
    **dict.fromkeys(STORED, float),
    **dict.fromkeys(("precision", "status"), str),
}
"""The columns of the row of an FFN, in order, with their types."""


@dataclass(frozen=True)
class FFNSpectra:
    """The result of one measurement for one FFN.

    Attributes:
        layer: index of the block, from 0.
        ffn: which FFN of the block.
        n_samples: tokens (or patches, or channels) measured; the same before and after.
        d_in: width of the FFN's input; bounds the rank before the nonlinearity.
        d_ff: hidden width, the number of eigenvalues.
        pre: eigenvalues before the nonlinearity, descending, float64 `[d_ff]`.
        post: eigenvalues after it, likewise.
        precision: how the products of the covariances were computed; the less precise of the two.
            With `projected_`, it names the dtype whose rounding is left out of pre.
        pre_shares, post_shares: the variance shares of the mean, the farthest samples and the
            positions.
        variance_outside: the share of post's variance outside the span that pre can reach; NaN if
            no weight defines that span.
    """

    layer: int
    ffn: str
    n_samples: int
    d_in: int
    d_ff: int
    pre: Tensor
    post: Tensor
    precision: str
    pre_shares: Shares
    post_shares: Shares
    variance_outside: float

    @cached_property
    def status(self) -> str:
        """`ok`, or why metrics are null: `too_few_samples`, `non_finite` or `zero_variance`, the
        last two with `_pre` or `_post` if only one side is affected."""
        if self.n_samples < 2:
            return TOO_FEW_SAMPLES
        for reason, holds in WHY_NULL.items():
            pre, post = holds(self.pre), holds(self.post)
            if pre or post:
                return reason if pre and post else f"{reason}_{'pre' if pre else 'post'}"
        return "ok"

    def row(self) -> dict[str, Any]:
        """The measurement as columns of the `metrics` table; None where nothing can be measured.

        It is computed once, by whichever thread asks first.
        """
        return {
            "layer": self.layer,
            "ffn": self.ffn,
            "n_samples": self.n_samples,
            "d_ff": self.d_ff,
            "d_in": self.d_in,
            **self._metrics,
            "precision": self.precision,
            "status": self.status,
        }

    @cached_property
    def pooled(self) -> list["GroupSpectrum"]:
        """Pre and post over all samples, for comparison with groups and other sites."""
        return [
            GroupSpectrum(self.layer, self.ffn, site, POOLED, POOLED, self.n_samples, values)
            for site, values in (("pre", self.pre), ("post", self.post))
        ]

    @cached_property
    def _metrics(self) -> dict[str, float | None]:
        values = {name: float(of(self.pre, self.post)) for name, of in OF_TWO_SPECTRA.items()}
        values["variance_outside"] = self.variance_outside
        sites, both = ("pre", "post"), torch.stack([self.pre, self.post])
        for column, of_one in OF_ONE_SPECTRUM.items():
            for site, value in zip(sites, of_one(both, self.n_samples).tolist(), strict=True):
                values[column.format(site=site)] = value
        for site, shares in zip(sites, (self.pre_shares, self.post_shares), strict=True):
            # Without variance, the rest is rounding.
            varies = values[f"variance_{site}"] > 0
            values[f"largest_share_{site}"] = shares.largest if varies else math.nan
            values[f"top_share_{site}"] = shares.top if varies else math.nan
            values[f"mean_share_{site}"] = shares.mean
            values[f"position_ratio_{site}"] = shares.position if varies else math.nan
        return {name: values[name] if math.isfinite(values[name]) else None for name in STORED}


@dataclass(frozen=True)
class FFNEigenproblem:
    """What a measurement accumulated for one FFN; `solve` returns its spectra.

    Only the lower triangle of each matrix counts. Its eigenvalues are (N - 1) times those of a
    covariance; missing ones are 0.

    Attributes:
        layer, ffn, n_samples, d_in, d_ff, precision: as in `FFNSpectra`.
        before: float64 `[k, k]`, k <= d_ff, for pre; or, with `of_input`, for the FFN's input,
            `[d_in, d_in]`.
        post: float64 `[k, k]`, for post.
        shares: float64 `[2, 4]`, the `Shares` of pre and of post.
        weight: W of pre = W x + b, `[d_ff, d_in]`, d_in < d_ff, if it can be read.
        of_input: whether `before` is for x, so that the one for pre is `W C_x W^T`.
        post_samples: if `post` is a Gram matrix, its samples, `[k, d_ff]`.
    """

    layer: int
    ffn: str
    n_samples: int
    d_in: int
    d_ff: int
    precision: str
    before: Tensor
    post: Tensor
    shares: Tensor
    weight: Tensor | None = None
    of_input: bool = False
    post_samples: Tensor | None = None

    def solve(self) -> FFNSpectra:
        """Solves both eigenproblems on the tensors' device."""
        degrees = self.n_samples - 1 if self.n_samples >= 2 else math.nan
        if self.of_input:
            assert self.weight is not None
            pre = projected_eigenvalues(self.weight, self.before)
        else:
            pre = eigenvalues(self.before, self.d_ff)
        pre_shares, post_shares = (Shares(*shares) for shares in self.shares.tolist())
        return FFNSpectra(
            layer=self.layer,
            ffn=self.ffn,
            n_samples=self.n_samples,
            d_in=self.d_in,
            d_ff=self.d_ff,
            pre=pre.cpu() / degrees,
            post=eigenvalues(self.post, self.d_ff).cpu() / degrees,
            precision=self.precision,
            pre_shares=pre_shares,
            post_shares=post_shares,
            variance_outside=self._variance_outside(),
        )

    def _variance_outside(self) -> float:
        if self.weight is None or self.n_samples < 2:
            return math.nan
        if self.post_samples is None:
            return float(variance_outside(self.weight, scatter=self.post))
        return float(variance_outside(self.weight, samples=self.post_samples))


@dataclass(frozen=True)
class GroupSpectrum:
    """The result of one measurement for one group of samples at one site of an FFN.

    Attributes:
        layer, ffn: the FFN.
        site: one of `nerve.sites_and_groups.GROUP_SITES`.
        grouping, group: the samples; both `all` for all of them.
        n_samples: number of samples.
        eigenvalues: descending, float64 `[dim]`.
    """

    layer: int
    ffn: str
    site: str
    grouping: str
    group: str
    n_samples: int
    eigenvalues: Tensor

    @cached_property
    def status(self) -> str:
        """`ok`, or why metrics are null: `too_few_samples`, `non_finite` or `zero_variance`."""
        if self.n_samples < 2:
            return TOO_FEW_SAMPLES
        return next((why for why, holds in WHY_NULL.items() if holds(self.eigenvalues)), "ok")

    def row(self) -> dict[str, Any]:
        """The spectrum as columns of the `groups` table; None where nothing can be measured. As in
        `FFNSpectra.row`, it is computed once."""
        return {
            "layer": self.layer,
            "ffn": self.ffn,
            "site": self.site,
            "grouping": self.grouping,
            "group": self.group,
            "n_samples": self.n_samples,
            "dim": len(self.eigenvalues),
            **self._metrics,
            "status": self.status,
        }

    @cached_property
    def _metrics(self) -> dict[str, float | None]:
        values = {
            name: float(of(self.eigenvalues, self.n_samples)) for name, of in OF_A_GROUP.items()
        }
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True)
class GroupEigenproblem:
    """What a measurement accumulated for one group at one site; `solve` returns its spectrum.

    Attributes:
        layer, ffn, site, grouping, group, n_samples: as in `GroupSpectrum`.
        dim: number of features.
        matrix: float64 `[k, k]`, whose lower triangle counts; its eigenvalues are (N - 1) times
            those of the covariance, or of that of the FFN's input if there is a `weight`.
        weight: W if the features are pre = W x + b and the matrix is for x.
    """

    layer: int
    ffn: str
    site: str
    grouping: str
    group: str
    n_samples: int
    dim: int
    matrix: Tensor
    weight: Tensor | None = None

    def solve(self) -> GroupSpectrum:
        """Solves the eigenproblem on the tensors' device."""
        if self.n_samples < 2:
            values = torch.full((self.dim,), math.nan, dtype=torch.float64)
        elif self.weight is not None:
            values = projected_eigenvalues(self.weight, self.matrix).cpu() / (self.n_samples - 1)
        else:
            values = eigenvalues(self.matrix, self.dim).cpu() / (self.n_samples - 1)
        place = (self.layer, self.ffn, self.site, self.grouping, self.group)
        return GroupSpectrum(*place, self.n_samples, values)
