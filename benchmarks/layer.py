"""One FFN layer on the CPU: the spectra before and after the nonlinearity, against the direct way.

The direct way takes the full covariance of both sides and solves both d_ff × d_ff eigenproblems.
They run in turn; medians and spread are printed, with the largest differences of the metrics.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from nerve.measuring.eigenproblem import FFNSpectra
from nerve.measuring.ffns import FFNAdapter
from nerve.measuring.measurement import Measurement
from nerve.measuring.probe import Probe
from nerve.spectra import participation_ratio, spectral_entropy


def ours(probe: Probe, up: nn.Linear, down: nn.Linear, x: Tensor) -> FFNSpectra:
    measurement = Measurement(probe)
    measurement.start()
    down(nn.functional.gelu(up(x)))
    measurement.finish_forward()
    measurement.stop()
    return measurement.spectra()[0]


def direct(pre: Tensor, post: Tensor) -> list[Tensor]:
    spectra = []
    for features in (pre, post):
        x = features - features.mean(0)
        spectra.append(torch.linalg.eigvalsh((x.T @ x / (len(x) - 1)).double()).clamp(min=0))
    return spectra


def exact(features: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(torch.cov(features.double().T)).clamp(min=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--d-ff", type=int, default=3072)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.samples, args.d_model, generator=generator)
    x = nn.functional.layer_norm(x * torch.arange(1, args.d_model + 1) ** -0.5, (args.d_model,))
    up, down = nn.Linear(args.d_model, args.d_ff), nn.Linear(args.d_ff, args.d_model)
    torch.nn.init.normal_(up.weight, std=0.05, generator=generator)
    with torch.no_grad():
        pre = up(x)
        post = nn.functional.gelu(pre)
        probe = Probe([FFNAdapter(0, "ffn", up, down)])
        probe.install()
        times: dict[str, list[float]] = {"direct": [], "forward": [], "ours": []}
        for _ in range(args.repeats):
            began = time.perf_counter()
            direct(pre, post)
            times["direct"].append(time.perf_counter() - began)
            began = time.perf_counter()
            down(nn.functional.gelu(up(x)))
            times["forward"].append(time.perf_counter() - began)
            began = time.perf_counter()
            spectra = ours(probe, up, down, x)
            times["ours"].append(time.perf_counter() - began)
        times["ours"] = [o - f for o, f in zip(times["ours"], times["forward"], strict=True)]
        ratios = [d / o for d, o in zip(times["direct"], times["ours"], strict=True)]
        for name, note in (("direct", ""), ("ours", ", without the forward pass")):
            low, high = min(times[name]), max(times[name])
            print(
                f"{name:6} {statistics.median(times[name]):.2f} s ({low:.2f} to {high:.2f}){note}"
            )
        print(
            f"{statistics.median(ratios):.2f} times cheaper "
            f"({min(ratios):.2f} to {max(ratios):.2f}, pair by pair)"
        )
        for site, features, spectrum in (("pre", pre, spectra.pre), ("post", post, spectra.post)):
            reference = exact(features)
            entropy = float((spectral_entropy(spectrum) - spectral_entropy(reference)).abs())
            pr = float((participation_ratio(spectrum) / participation_ratio(reference) - 1).abs())
            print(f"{site}: SE off by {entropy:.1e} nats, PR by {pr:.1e}, against float64")


if __name__ == "__main__":
    main()
