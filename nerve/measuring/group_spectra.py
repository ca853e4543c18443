"""The eigenproblems of sites and of groups of samples, and the spectra that solve them."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nerve.measuring.eigenproblem import TOO_FEW_SAMPLES, WHY_NULL, FFNSpectra
from nerve.metric_names import POOLED
from nerve.spectra import eigenvalues, projected_eigenvalues
from nerve.spectra.metrics import OF_A_GROUP


@dataclass(frozen=True)
class GroupSpectrum:
    """What one measurement says of the samples of one group at one site of an FFN.

    Attributes:
        layer, ffn: of the FFN.
        site: one of `nerve.metric_names.GROUP_SITES`.
        grouping, group: of the samples; both `all` for all of them.
        n_samples: how many.
        eigenvalues: descending, float64 `[dim]`.
    """

    layer: int
    ffn: str
    site: str
    grouping: str
    group: str
    n_samples: int
    eigenvalues: Tensor

    @property
    def status(self) -> str:
        """`ok`, or why metrics are null: `too_few_samples`, `non_finite` or `zero_variance`."""
        if self.n_samples < 2:
            return TOO_FEW_SAMPLES
        return next((why for why, holds in WHY_NULL.items() if holds(self.eigenvalues)), "ok")

    def row(self) -> dict[str, Any]:
        """The spectrum as columns of the `groups` table; None where nothing can be measured."""
        values = {name: float(of(self.eigenvalues, self.n_samples)) for name, of in _METRICS}
        return {
            "layer": self.layer,
            "ffn": self.ffn,
            "site": self.site,
            "grouping": self.grouping,
            "group": self.group,
            "n_samples": self.n_samples,
            "dim": len(self.eigenvalues),
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
            "status": self.status,
        }


_METRICS = tuple(OF_A_GROUP.items())


@dataclass(frozen=True)
class GroupEigenproblem:
    """What a measurement accumulated of one group at one site; `solve` gives its spectrum.

    Attributes:
        layer, ffn, site, grouping, group, n_samples: as in `GroupSpectrum`.
        dim: number of features.
        matrix: float64 `[k, k]`, whose lower triangle counts; its eigenvalues are (N - 1) times
            those of the covariance, or of that of the FFN's input where there is a `weight`.
        weight: W where the features are pre = W x + b and the matrix is that of x.
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
        """Solves the eigenproblem where the tensors lie."""
        if self.n_samples < 2:
            values = torch.full((self.dim,), math.nan, dtype=torch.float64)
        elif self.weight is not None:
            values = projected_eigenvalues(self.weight, self.matrix).cpu() / (self.n_samples - 1)
        else:
            values = eigenvalues(self.matrix, self.dim).cpu() / (self.n_samples - 1)
        place = (self.layer, self.ffn, self.site, self.grouping, self.group)
        return GroupSpectrum(*place, self.n_samples, values)


def pooled_spectra(spectra: FFNSpectra) -> list[GroupSpectrum]:
    """Those of pre and post of an FFN, of all samples, to stand beside groups and other sites."""
    place = (spectra.layer, spectra.ffn)
    return [
        GroupSpectrum(*place, site, POOLED, POOLED, spectra.n_samples, values)
        for site, values in (("pre", spectra.pre), ("post", spectra.post))
    ]
