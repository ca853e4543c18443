"""One measurement of a model: the spectra before and after the nonlinearity of each of its FFNs."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pandas as pd
import torch
import torch.distributed as dist

# Before any process group exists: its functions have the group as default argument. Imported later
# (torch.compile's modules do so), they keep its threads alive into the end of the interpreter,
# where a thread that lets go of a tensor aborts the process.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from nerve.errors import MeasurementError
from nerve.probe import FFN, Probe, find_ffns, is_tap
from nerve.problem import FFNProblem, FFNSpectra
from nerve.spectra import StreamingCovariance
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
            W C_x Wᵀ, where that is as exact and cheaper (see `_takes_shortcut`).
    """

    def __init__(self, probe: Probe, *, shortcut: bool = True) -> None:
        self._probe = probe
        self._shortcut = shortcut
        self._mask: Tensor | None = None
        self._d_in: dict[int, int] = {}
        self._weights: dict[int, Tensor] = {}
        self._covariances: dict[tuple[int, Site], StreamingCovariance] = {}

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
        problems of its share.

        Every process must call it; one may have measured nothing.
        """
        seen = {key: (c.dim, c.tally()) for key, c in self._covariances.items()}
        mine = (self._d_in, list(self._weights), seen)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        tallies: dict[tuple[int, Site], list[Tally]] = defaultdict(list)
        for d_in, _, theirs in everyone:
            self._d_in |= d_in
            for (index, site), (dim, tally) in theirs.items():
                if (index, site) not in self._covariances:  # else it knows its device
                    self._covariance(index, site, dim, _device(self._probe.ffns[index]))
                tallies[index, site].append(tally)
        for index, site in sorted(tallies):
            covariance = self._covariances[index, site]
            covariance.reduce(index % len(everyone), tallies[index, site])
        self._share_weights([set(weights) for _, weights, _ in everyone])

    def _share_weights(self, holders: list[set[int]]) -> None:
        """Gives weights of the shortcut to the processes that saw no forward pass."""
        for index in sorted(set.union(*holders)):
            if all(index in holder for holder in holders):
                continue
            weight = self._weights.get(index)
            if weight is None:
                post = self._covariances[index, "post"]
                parameter = next(self._probe.ffns[index].pre.parameters())
                weight = parameter.new_empty(post.dim, self._d_in[index])
            owner = next(rank for rank, holder in enumerate(holders) if index in holder)
            dist.broadcast(weight, src=owner)
            self._weights[index] = weight

    def problems(self, share: int = 0, n_shares: int = 1) -> list[FFNProblem]:
        """What is left to solve: one problem for each FFN, in the order given.

        Args:
            share, n_shares: of several processes, which one takes its share: every `n_shares`-th
                problem, from number `share` on.

        Raises:
            MeasurementError: if nothing was measured, or if the features of an FFN before and after
                its nonlinearity are not of the same samples and width.
        """
        numbered = list(enumerate(self._probe.ffns))
        return [self._problem_of(index, ffn) for index, ffn in numbered[share::n_shares]]

    def spectra(self) -> list[FFNSpectra]:
        """Solves the problems, one after the other. Raises as `problems`."""
        return [problem.solve() for problem in self.problems()]

    def _accumulate(self, index: int, inputs: Tensor, pre: Tensor, post: Tensor) -> None:
        if index not in self._d_in:
            self._d_in[index] = inputs.shape[-1]
            module = self._probe.ffns[index].pre
            if self._shortcut and _takes_shortcut(module, inputs, pre):
                assert isinstance(module.weight, Tensor)
                # A copy: the optimizer may step before the problems are solved.
                self._weights[index] = module.weight.detach().clone()
        if index in self._weights:
            self._update(index, "input", inputs)
        else:
            self._update(index, "pre", pre)
        self._update(index, "post", post)

    def _update(self, index: int, site: Site, features: Tensor) -> None:
        covariance = self._covariance(index, site, features.shape[-1], features.device)
        covariance.update(features, self._mask)

    def _covariance(
        self, index: int, site: Site, dim: int, device: torch.device
    ) -> StreamingCovariance:
        key = (index, site)
        if key not in self._covariances:
            # The input's problem is small, and its rounding would be magnified by the weight.
            product = "float64" if site == "input" else None
            self._covariances[key] = StreamingCovariance(dim, device=device, product=product)
        return self._covariances[key]

    def _problem_of(self, index: int, ffn: FFN) -> FFNProblem:
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
        return FFNProblem(
            layer=ffn.layer,
            ffn=ffn.name,
            d_in=self._d_in[index],
            d_ff=d_ff,
            precision=coarsest([before.precision, post.precision]),
            n_samples=post.n_samples,
            before=before.eigenproblem() if weight is None else before.scatter(),
            post=post.eigenproblem(),
            weight=weight,
        )


def _device(ffn: FFN) -> torch.device:
    return next(ffn.pre.parameters()).device


def _takes_shortcut(module: nn.Module, inputs: Tensor, outputs: Tensor) -> bool:
    """Whether the outputs are W x + b of a weight that can be read, wider than x, and not rounded
    to 16 bits on the way (which the shortcut would leave out). A forward of the module's own or a
    hook may change them (an adapter, an ablation); a parametrized weight in training is another at
    each reading (spectral norm iterates)."""
    return (
        type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and all(is_tap(hook) for hook in module._forward_hooks.values())
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
    mask: Callable[[Any], Tensor | None] | None = None,
    shortcut: bool = True,
) -> pd.DataFrame:
    """Measures the FFNs of any torch model over batches; neither Lightning nor Hydra is needed.

    The model runs in eval mode without gradients, uncompiled, and is left as it was: weights,
    modes, hooks, compiled code and random states.

    Args:
        model: the model, on the device of the batches.
        batches: what `forward` takes; all of them make one measurement.
        ffns: descriptions of the FFNs, for a model whose modules do not fulfil `nerve.probe.FFN`,
            or those to measure of them.
        forward: runs the model on one batch; by default `model(batch)`, or `model(**batch)` for a
            mapping.
        mask: gives a batch's mask `[*samples]`, True (or 1) for the samples that count; by default
            the `attention_mask` of a mapping that has one. None counts all.
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
    run, mask_of = forward or _call, mask or _attention_mask
    modes = {module: module.training for module in model.modules()}
    probe = Probe(find_ffns(model) if ffns is None else ffns)
    measurement = Measurement(probe, shortcut=shortcut)
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
    return rows.astype({name: float for name in rows if rows[name].isna().all()})


def _uncompiled() -> AbstractContextManager[object]:
    """Code that was compiled before knows no probe; without its compiler nothing is compiled."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else nullcontext()


def _call(model: nn.Module, batch: Any) -> object:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _attention_mask(batch: Any) -> Tensor | None:
    return batch.get("attention_mask") if isinstance(batch, Mapping) else None
