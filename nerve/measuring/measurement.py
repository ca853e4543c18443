"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from nerve.errors import MeasurementError
from nerve.measuring.distributed import (
    gathered,
    reduce_covariance,
    reduce_shares,
    shared_from,
)
from nerve.measuring.eigenproblem import FFNEigenproblem, FFNSpectra
from nerve.measuring.ffns import FFN, find_ffns
from nerve.measuring.probe import Probe
from nerve.measuring.weights import gives, is_unrounded, weight_of
from nerve.outliers import outliers
from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.covariance import Tally
from nerve.spectra.product import coarsest

Site = Literal["input", "pre", "post"]
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
        self._mask: Tensor | None = None
        self._d_in: dict[int, int] = {}
        self._weights: dict[int, Tensor] = {}
        self._biases: dict[int, Tensor | None] = {}
        self._of_input: set[int] = set()
        self._altered: set[int] = set()
        self._covariances: dict[tuple[int, Site], StreamingCovariance] = {}
        self._shares: dict[tuple[int, Site], SampleShares] = {}

    def start(self, mask: Tensor | None = None) -> None:
        """Measures forward passes from now on.

        Args:
            mask: bool, True for the samples that count (False: padding), in the shape of the
                features without their last dimension.
        """
        self._mask = mask
        self._probe.start(self._accumulate)

    def stop(self) -> None:
        """Stops measuring; allowed at any time."""
        self._probe.stop()

    def finish_forward(self) -> None:
        """Ends one forward pass; raises `MeasurementError` for missing or doubled features."""
        self._probe.finish_forward()

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
        tallies: dict[tuple[int, Site], list[Tally]] = defaultdict(list)
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
            MeasurementError: if nothing was measured, or if the features of an FFN before and after
                its nonlinearity are not of the same samples and width.
        """
        numbered = list(enumerate(self._probe.ffns))
        return [self._eigenproblem_of(index, ffn) for index, ffn in numbered[share::n_shares]]

    def spectra(self) -> list[FFNSpectra]:
        """Solves the eigenproblems, one after the other. Raises as `eigenproblems`."""
        return [eigenproblem.solve() for eigenproblem in self.eigenproblems()]

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        module = self._probe.ffns[index].pre
        if index not in self._d_in:
            self._d_in[index] = inputs.shape[-1]
            self._take_weight(index, module, inputs, pre)
        elif index in self._weights and not self._is_same(index, module, inputs, pre):
            self._leave_weight(index)
        first: Site = "input" if index in self._of_input else "pre"
        features: dict[Site, Tensor] = {"input": inputs, "pre": pre, "post": post}
        mask = self._mask
        if self._skip_first:
            features = {site: self._skipped(features[site]) for site in features}
            mask = None if mask is None else mask[..., self._skip_first :]
        for site in (first, "post"):
            x = features[site]
            self._covariance(index, site, x.shape[-1], x.device).update(x, mask)
        for site in ("pre", "post"):
            x = features[site]
            self._shares_of(index, site, x.shape[-1], x.device).update(x, mask)

    def _take_weight(self, index: int, module: nn.Module, inputs: Tensor, pre: Tensor) -> None:
        """Notes W and b of `pre = W x + b`, where it is that."""
        weight = weight_of(module, inputs, pre)
        if weight is None:
            return
        bias = module.bias
        assert bias is None or isinstance(bias, Tensor)
        # Copies: the optimizer may step before the eigenproblems are solved. Under autocast the
        # forward has used them rounded, as its outputs tell.
        weight = weight.to(pre.dtype, copy=True)
        bias = None if bias is None else bias.detach().to(pre.dtype, copy=True)
        if not gives(weight, bias, inputs, pre):
            self._altered.add(index)
            return
        self._weights[index], self._biases[index] = weight, bias
        if self._shortcut and is_unrounded(inputs, pre):
            self._of_input.add(index)

    def _is_same(self, index: int, module: nn.Module, inputs: Tensor, pre: Tensor) -> bool:
        """Whether this forward pass has used the weight of the first one, and nothing else."""
        weight, noted = weight_of(module, inputs, pre), self._weights[index]
        return (
            weight is not None
            and torch.equal(weight.to(noted.dtype), noted)
            and gives(noted, self._biases[index], inputs, pre)
        )

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
        self, index: int, site: Site, dim: int, device: torch.device
    ) -> StreamingCovariance:
        key = (index, site)
        if key not in self._covariances:
            # The input's eigenproblem is small, and its rounding would be magnified by the weight.
            product = "float64" if site == "input" else None
            self._covariances[key] = StreamingCovariance(dim, device=device, product=product)
        return self._covariances[key]

    def _shares_of(self, index: int, site: Site, dim: int, device: torch.device) -> SampleShares:
        key = (index, site)
        if key not in self._shares:
            self._shares[key] = SampleShares(dim, device=device)
        return self._shares[key]

    def _eigenproblem_of(self, index: int, ffn: FFN) -> FFNEigenproblem:
        where = f"{ffn.name} in layer {ffn.layer}"
        if (index, "post") not in self._covariances:
            raise MeasurementError(
                f"A measurement needs at least one forward pass; {where} saw none. "
                "Give at least one batch."
            )
        weight, post = self._weights.get(index), self._covariances[index, "post"]
        of_input = index in self._of_input
        before = self._covariances[index, "input" if of_input else "pre"]
        d_ff = self._shares[index, "pre"].dim
        if (before.n_samples, d_ff) != (post.n_samples, post.dim):
            raise MeasurementError(
                "Features before and after a nonlinearity must be of the same samples and width; "
                f"{where} has {before.n_samples} × {d_ff} before and {post.n_samples} × {post.dim} "
                "after. Check which modules its description names."
            )
        return FFNEigenproblem(
            layer=ffn.layer,
            ffn=ffn.name,
            d_in=self._d_in[index],
            d_ff=d_ff,
            precision=coarsest([before.precision, post.precision]),
            n_samples=post.n_samples,
            before=before.scatter() if of_input else before.eigenproblem(),
            post=post.eigenproblem(),
            shares=torch.stack([self._shares[index, site].shares() for site in ("pre", "post")]),
            weight=weight,
            of_input=of_input,
            post_samples=None if weight is None else post.held_samples(),
        )


def _device(ffn: FFN) -> torch.device:
    return next(ffn.pre.parameters()).device


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ffns: Sequence[FFN] | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    mask: Callable[[Any], Tensor | None] | None = None,
    shortcut: bool = True,
    skip_first: int = 0,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches.
        batches: what `forward` takes; all of them make one measurement.
        ffns: descriptions of the FFNs, for a model whose modules do not fulfil
            `nerve.measuring.ffns.FFN`, or those to measure of them.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        mask: gives a batch's mask `[*samples]`, True (or 1) for the samples that count; by default
            the `attention_mask` of a mapping that has one. None counts all.
        shortcut: whether pre may be computed from the covariance of the FFN's input where that is
            as exact and cheaper; False always takes the features themselves.
        skip_first: leaves out so many positions at the beginning of each sequence, which in many
            trained models hold most of the variance.

    Returns:
        One row per FFN: layer, ffn, n_samples, d_ff, d_in; spectral entropy (se, nats),
        participation ratio (pr), eigenvalue early enrichment (eee), total variance and corrected
        pr, shares of the farthest sample, of the farthest 0.1% and of the mean, each _pre and
        _post; Jensen-Shannon divergence (js, nats); variance_outside; precision and status. NaN
        where nothing can be measured, status says why. `outliers` names the sites whose spectrum
        may be that of a few samples.

    Raises:
        MeasurementError: for a model without FFNs, no batches, or wrong, missing or doubled
            features.
    """
    run, mask_of = forward or _call, mask or _attention_mask
    modes = {module: module.training for module in model.modules()}
    probe = Probe(find_ffns(model) if ffns is None else ffns)
    measurement = Measurement(probe, shortcut=shortcut, skip_first=skip_first)
    model.eval()
    probe.install()
    try:
        with torch.no_grad(), _uncompiled():
            for batch in batches:
                samples = mask_of(batch)
                measurement.start(samples if samples is None else samples.bool())
                run(model, batch)
                measurement.finish_forward()
    finally:
        probe.remove()
        for module, training in modes.items():
            module.training = training
    rows = pd.DataFrame([spectra.row() for spectra in measurement.spectra()])
    rows = rows.astype({name: float for name in rows if rows[name].isna().all()})
    return rows.assign(outliers=outliers(rows))


def _uncompiled() -> AbstractContextManager[object]:
    """Code that was compiled before knows no probe; without its compiler nothing is compiled."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _call(model: nn.Module, batch: Any) -> object:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _attention_mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None
