"""One measurement as it is taken without nerve, in which training waits, for monitor.py.

- buffered: all features to the host, and back one at a time for covariance and `eigvalsh`;
- svdvals: `torch.linalg.svdvals` of the centered features, where they are;
- IncrementalPCA: scikit-learn's `partial_fit` on the host, from forward hooks;
- delve: `TorchCovarianceMatrix` of this package, and `eigvalsh`, where it is installed.

All but the first take only some of the sites, and their time is scaled to all. What they find is
held against the participation ratio of the same features in float64. delve's own hooks are not
used: of outputs [batch, seq, d] they take seq * d features, or those of the last token alone.
weightwatcher measures weights, not features, and torchmetrics has no spectra.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nerve.measuring.find import find_ffns
from nerve.measuring.probe import Probe

Spectrum = Callable[[Tensor], Tensor]
"""Features [n, d] of 16 bits to the eigenvalues of their covariance, up to a factor."""


def svdvals(x: Tensor) -> Tensor:
    x = x.float()
    return torch.linalg.svdvals(x - x.mean(0)).square()


def incremental_pca(x: Tensor) -> Tensor:
    from sklearn.decomposition import IncrementalPCA

    pca, features = IncrementalPCA(), x.float().cpu()
    # As many rows at once as `fit` would take.
    for rows in features.tensor_split(max(1, len(x) // (5 * x.shape[1]))):
        pca.partial_fit(rows.numpy())
    return torch.from_numpy(pca.explained_variance_)


def by_delve(x: Tensor) -> Tensor:
    from delve.torch_utils import TorchCovarianceMatrix

    covariance = TorchCovarianceMatrix(device=x.device)
    covariance.update(x, False)
    return torch.linalg.eigvalsh(covariance.fix())


WAYS: dict[str, Spectrum] = {
    "svdvals": svdvals,
    "IncrementalPCA": incremental_pca,
    "delve": by_delve,
}


def participation_ratio(eigenvalues: Tensor) -> float:
    return float(eigenvalues.sum() ** 2 / eigenvalues.square().sum())


def exact_participation_ratio(x: Tensor) -> float:
    centered = x.double() - x.double().mean(0)
    covariance = centered.T @ centered
    return float(covariance.trace() ** 2 / covariance.square().sum())


class Sites:
    """The features of a model's FFNs in one forward pass under bfloat16 autocast, post first."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self._model, self._inputs = model, inputs
        self._probe = Probe(find_ffns(model))
        self.n = 2 * len(self._probe.ffns)

    def each(self, take: Callable[[Tensor], None]) -> float:
        """Hands the features [batch, seq, d] of each site to `take`; seconds of the whole."""
        self._probe.install()
        self._synchronize()
        began = time.perf_counter()
        self._probe.start(lambda index, inputs, pre, post: (take(post), take(pre)))
        with torch.no_grad(), torch.autocast(self._inputs.device.type, dtype=torch.bfloat16):
            self._model(self._inputs)
        self._probe.remove()
        self._synchronize()
        return time.perf_counter() - began

    def seconds(self, spectrum: Spectrum, n_sites: int) -> tuple[float, float]:
        """Of a measurement of all sites, if each takes as long as the first `n_sites`; and the
        largest relative error of their participation ratios."""
        spent, errors = 0.0, []

        def take(x: Tensor) -> None:
            nonlocal spent
            if len(errors) == n_sites:
                return
            x = x.flatten(0, -2)
            self._synchronize()
            began = time.perf_counter()
            found = participation_ratio(spectrum(x))  # the host waits for it
            spent += time.perf_counter() - began
            errors.append(abs(found / exact_participation_ratio(x) - 1))

        spectrum(torch.randn(64, 16, device=self._inputs.device))  # makes handles
        forward = min(self.each(lambda x: None) for _ in range(2))
        self.each(take)
        return forward + spent / len(errors) * self.n, max(errors)

    def buffered(self) -> float:
        """Seconds of a measurement that keeps all features on the host."""
        kept: list[Tensor] = []
        seconds = self.each(lambda x: kept.append(x.float().cpu()))
        began = time.perf_counter()
        for features in kept:
            x = features.flatten(0, -2).to(self._inputs.device)
            x = x - x.mean(0)
            torch.linalg.eigvalsh(x.T @ x / (len(x) - 1))
        self._synchronize()
        return seconds + time.perf_counter() - began

    def _synchronize(self) -> None:
        if self._inputs.is_cuda:
            torch.cuda.synchronize()


def compare(model: nn.Module, inputs: Tensor, stall_s: float, n_sites: int) -> None:
    """Prints the seconds of one measurement by each way, and how many times nerve's stall that is.

    Args:
        inputs: of the model, where it is.
        stall_s: mean stall of a measurement.
        n_sites: how many sites to take where not all are.
    """
    sites = Sites(model, inputs)
    seconds = sites.buffered()
    print(f"buffered way: {seconds:.1f} s, {seconds / stall_s:.0f} times the stall", flush=True)
    for name, spectrum in WAYS.items():
        try:
            seconds, error = sites.seconds(spectrum, n_sites)
        except ImportError as problem:
            print(f"{name}: {problem}")
            continue
        print(
            f"{name}: {seconds:.1f} s, {seconds / stall_s:.0f} times the stall ({n_sites} of "
            f"{sites.n} sites taken; participation ratio off by {error:.1e})",
            flush=True,
        )
