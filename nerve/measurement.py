"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from nerve.errors import MeasurementError
from nerve.probe import FFN, Probe, Site, find_ffns
from nerve.spectra import (
    StreamingCovariance,
    corrected_participation_ratio,
    eigenvalue_early_enrichment,
    eigenvalues,
    jensen_shannon,
    participation_ratio,
    projected_eigenvalues,
    spectral_entropy,
)


@dataclass(frozen=True)
class FFNSpectra:
    """What one measurement says of one FFN.

    Attributes:
        layer: index of the block, from 0.
        ffn: which FFN of the block.
        n_samples: tokens (or patches, or channels) measured; the same before and after.
        d_in: width of the FFN's input; bounds the rank before the nonlinearity.
        d_ff: hidden width, the number of eigenvalues.
        pre: eigenvalues before the nonlinearity, descending, float64 `[d_ff]`.
        post: eigenvalues after it, likewise.
        precision: how the products of the covariance were taken.
    """

    layer: int
    ffn: str
    n_samples: int
    d_in: int
    d_ff: int
    pre: Tensor
    post: Tensor
    precision: str

    @property
    def status(self) -> str:
        """`ok`, or why metrics are null: `too_few_samples`, `non_finite` or `zero_variance`,
        the last two with `_pre` or `_post` where it is one side alone."""
        if self.n_samples < 2:
            return "too_few_samples"
        for reason, holds in (
            ("non_finite", lambda spectrum: not bool(torch.isfinite(spectrum).all())),
            ("zero_variance", lambda spectrum: not bool(spectrum.sum() > 0)),
        ):
            pre, post = holds(self.pre), holds(self.post)
            if pre or post:
                return reason if pre and post else f"{reason}_{'pre' if pre else 'post'}"
        return "ok"

    def row(self) -> dict[str, Any]:
        """The measurement as columns of the `metrics` table; None where nothing can be measured."""
        metrics: dict[str, float] = {"js": float(jensen_shannon(self.pre, self.post))}
        for site, spectrum in (("pre", self.pre), ("post", self.post)):
            ratio = participation_ratio(spectrum)
            metrics[f"se_{site}"] = float(spectral_entropy(spectrum))
            metrics[f"pr_{site}"] = float(ratio)
            metrics[f"eee_{site}"] = float(eigenvalue_early_enrichment(spectrum))
            metrics[f"variance_{site}"] = float(spectrum.sum())
            metrics[f"pr_{site}_corrected"] = float(
                corrected_participation_ratio(ratio, self.n_samples)
            )
        return {
            "layer": self.layer,
            "ffn": self.ffn,
            "n_samples": self.n_samples,
            "d_ff": self.d_ff,
            "d_in": self.d_in,
            **{name: value if np.isfinite(value) else None for name, value in metrics.items()},
            "precision": self.precision,
            "status": self.status,
        }


class Measurement:
    """Accumulates the covariances of every FFN's features over forward passes.

    Between `attach()` and `detach()` each forward pass of the model is measured; `finish_forward()`
    must follow each of them.

    Args:
        ffns: the FFNs to measure.
        shortcut: whether pre may be computed from the covariance of the FFN's input, C_pre =
            W C_x Wᵀ, where that is as exact and cheaper (see `_takes_shortcut`).
    """

    def __init__(self, ffns: Sequence[FFN], *, shortcut: bool = True) -> None:
        self._probe = Probe(ffns, self._accumulate)
        self._shortcut = shortcut
        self._inputs: dict[int, Tensor] = {}
        self._d_in: dict[int, int] = {}
        self._weights: dict[int, Tensor] = {}
        self._covariances: dict[tuple[int, Site], StreamingCovariance] = {}

    def attach(self) -> None:
        """Starts measuring forward passes."""
        self._probe.attach()

    def detach(self) -> None:
        """Stops measuring; allowed at any time."""
        self._probe.detach()

    def finish_forward(self) -> None:
        """Ends one forward pass; raises `MeasurementError` for missing or doubled features."""
        self._probe.finish_forward()

    def spectra(self) -> list[FFNSpectra]:
        """Solves the eigenvalue problems: one `FFNSpectra` for each FFN, in the order given.

        Raises:
            MeasurementError: if nothing was measured, or if the features of an FFN before and after
                its nonlinearity are not of the same samples and width.
        """
        return [self._spectra_of(index, ffn) for index, ffn in enumerate(self._probe.ffns)]

    def _accumulate(self, index: int, site: Site, features: Tensor) -> None:
        if site == "input":
            self._inputs[index] = features
        elif site == "pre":
            inputs = self._inputs.pop(index)
            if index not in self._d_in:
                self._d_in[index] = inputs.shape[-1]
                module = self._probe.ffns[index].pre
                if self._shortcut and _takes_shortcut(module, inputs, features):
                    assert isinstance(module.weight, Tensor)
                    # A copy: the optimizer may step before the problems are solved.
                    self._weights[index] = module.weight.detach().clone()
            if index in self._weights:
                self._update(index, "input", inputs, product="float64")
            else:
                self._update(index, "pre", features)
        else:
            self._update(index, "post", features)

    def _update(self, index: int, site: Site, features: Tensor, product: str | None = None) -> None:
        covariance = self._covariances.get((index, site))
        if covariance is None:
            covariance = StreamingCovariance(
                features.shape[-1], device=features.device, product=product
            )
            self._covariances[index, site] = covariance
        covariance.update(features)

    def _spectra_of(self, index: int, ffn: FFN) -> FFNSpectra:
        where = f"{ffn.name} in layer {ffn.layer}"
        if (index, "post") not in self._covariances:
            raise MeasurementError(
                f"A measurement needs at least one forward pass; {where} saw none. "
                "Give at least one batch."
            )
        weight, post = self._weights.get(index), self._covariances[index, "post"]
        before = self._covariances[index, "pre" if weight is None else "input"]
        d_ff = before.dim if weight is None else weight.shape[0]
        if (before.n_samples, d_ff) != (post.n_samples, post.dim):
            raise MeasurementError(
                "Features before and after a nonlinearity must be of the same samples and width; "
                f"{where} has {before.n_samples} × {d_ff} before and {post.n_samples} × {post.dim} "
                "after. Check which modules its description names."
            )
        covariance = before.covariance()
        return FFNSpectra(
            layer=ffn.layer,
            ffn=ffn.name,
            n_samples=post.n_samples,
            d_in=self._d_in[index],
            d_ff=d_ff,
            pre=(
                eigenvalues(covariance)
                if weight is None
                else projected_eigenvalues(weight, covariance)
            ),
            post=eigenvalues(post.covariance()),
            precision=post.precision,
        )


def _takes_shortcut(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether the outputs are W x + b of a weight that can be read, wider than x, and not rounded
    to 16 bits on the way (which the shortcut would leave out). A parametrized weight in training is
    another at each reading (spectral norm iterates)."""
    return (
        type(module).forward is nn.Linear.forward
        and outputs.shape[-1] > inputs.shape[-1]
        and inputs.dtype == outputs.dtype
        and outputs.dtype in (torch.float32, torch.float64)
        and not (module.training and is_parametrized(module))
    )


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    shortcut: bool = True,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, and is left as it was: weights, modes, hooks and
    random states.

    Args:
        model: the model, on the device of the batches.
        batches: what `forward` takes; all of them make one measurement.
        ffns: descriptions of the FFNs, for a model whose modules do not fulfil `nerve.probe.FFN`.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; False always takes the features themselves.

    Returns:
        One row an FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, each _pre and _post; Jensen-Shannon divergence (js, nats); precision and status. NaN
        where nothing can be measured, status says why.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or wrong, missing or doubled
            features.
    """
    run = forward or _call
    modes = {module: module.training for module in model.modules()}
    measurement = Measurement(find_ffns(model) if ffns is None else ffns, shortcut=shortcut)
    model.eval()
    measurement.attach()
    try:
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
                measurement.finish_forward()
    finally:
        measurement.detach()
        for module, training in modes.items():
            module.training = training
    rows = pd.DataFrame([spectra.row() for spectra in measurement.spectra()])
    return rows.astype({name: float for name in rows if rows[name].isna().all()})


def _call(model: nn.Module, batch: Any) -> object:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)
