"""What the columns on few samples, positions, the mean and the span of pre add to a measurement.

While features stream: `SampleShares` beside the covariance that takes the same batch. When spectra
are solved: `variance_outside` beside the eigenvalues of the same matrix, on the host as in training
on a GPU. The two of a pair run in alternation; mean and worst of each are printed, and of the share
that is added, pair by pair.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from nerve.spectra import SampleShares, StreamingCovariance, eigenvalues, variance_outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the features")
    parser.add_argument("--d-ff", type=int, nargs="+", default=[512, 3072])
    parser.add_argument("--samples", type=int, default=8, help="for each feature")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="that solve an eigenproblem")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    for d_ff in args.d_ff:
        stream(args, d_ff)
        solve(args, d_ff)


def stream(args: argparse.Namespace, d_ff: int) -> None:
    """Times the two accumulators on the same batches."""
    x = torch.randn(args.samples * d_ff, d_ff, device=args.device)
    x = torch.nn.functional.gelu(x * torch.linspace(0.1, 2, d_ff, device=args.device))
    sequences = x.to(getattr(torch, args.dtype)).view(-1, args.seq_len, d_ff)
    batches = sequences.chunk(args.batches)

    def covariance() -> None:
        accumulator = StreamingCovariance(d_ff, device=args.device)
        for batch in batches:
            accumulator.update(batch)
        accumulator.scatter()

    def shares() -> None:
        accumulator = SampleShares(d_ff, device=args.device)
        for batch in batches:
            accumulator.update(batch)
        accumulator.shares()

    report(
        f"stream, d_ff {d_ff}, {len(x):,} × {args.dtype}, {args.device}", args, covariance, shares
    )


def solve(args: argparse.Namespace, d_ff: int) -> None:
    """Times the two solutions of one matrix on the host."""
    torch.set_num_threads(args.threads)
    factor = torch.randn(d_ff, d_ff, dtype=torch.float64)
    scatter, weight = factor @ factor.T, torch.randn(d_ff, d_ff // 4)
    report(
        f"solve, d_ff {d_ff}, {args.threads} thread(s) of the host",
        argparse.Namespace(device="cpu", repeats=min(args.repeats, 5)),
        lambda: eigenvalues(scatter),
        lambda: variance_outside(weight, scatter=scatter),
    )


def report(
    title: str, args: argparse.Namespace, base: Callable[[], object], added: Callable[[], object]
) -> None:
    """Runs the two in alternation, after one of each, and prints a row for each."""
    times: dict[str, list[float]] = {"base": [], "added": []}
    for repeat in range(args.repeats + 1):
        for name, run in (("base", base), ("added", added)):
            spent = seconds(run, args.device)
            if repeat:
                times[name].append(1000 * spent)
    shares = [b / a for a, b in zip(times["base"], times["added"], strict=True)]
    for name, values in times.items():
        print(f"{title}: {name} {statistics.mean(values):.2f} ms, worst {max(values):.2f}")
    print(f"{title}: adds {statistics.mean(shares):.1%}, worst {max(shares):.1%}")


def seconds(run: Callable[[], object], device: str) -> float:
    """Wall time, the device's work included."""
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
