"""Whether processes that share a GPU survive the products of Muon: with the addition in the kernel
of cuBLAS, and as nerve adds.

Each process updates the matrices of a 12-layer GPT of width 512 over and over, with two other
kernels after each shape. Processes that a CUDA error ends are counted and not replaced.
"""

import argparse
import subprocess
import sys
import time

import torch
from torch import Tensor

from nerve.optim import muon

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((1536, 512), (512, 512), (2048, 512), (512, 2048))


def added_in_the_kernel(
    beta: float, base: Tensor, alpha: float, left: Tensor, right: Tensor
) -> Tensor:
    return torch.baddbmm(base, left, right, beta=beta, alpha=alpha)


WAYS = {"kernel": added_in_the_kernel, "nerve": muon._plus_product}


def repeat(way: str, seconds: float) -> int:
    """Updates until the time is over, adding in one way; returns how often."""
    muon._plus_product = WAYS[way]
    momenta = [torch.randn(12, *shape, device="cuda", dtype=torch.bfloat16) for shape in SHAPES]
    large = torch.randn(2**26, device="cuda")
    x, w = (torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16) for n in (8192, 2048))
    n, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for each in momenta:
            muon.orthogonalized(each, COEFFICIENTS, 5, 1e-7)
            large.mul_(1.0)
            x @ w
        torch.cuda.synchronize()
        n += 1
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each way, at most")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--one", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(repeat(arguments.one, arguments.seconds))
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{arguments.processes} processes on one GPU")
    for way in arguments.ways:
        command = [sys.executable, __file__, "--one", way, "--seconds", str(arguments.seconds)]
        pipe = subprocess.PIPE
        processes = [
            subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
            for _ in range(arguments.processes)
        ]
        outputs = [each.communicate() for each in processes]
        ended = zip(processes, outputs, strict=True)
        errors = [stderr for process, (_, stderr) in ended if process.returncode]
        updates = [int(stdout) for stdout, _ in outputs if stdout]
        print(f"{way}: {len(errors)} of {len(processes)} ended by an error; updates: {updates}")
        for stderr in errors:
            print(
                "   ",
                next((line for line in stderr.splitlines() if "Error:" in line), stderr[-200:]),
            )


if __name__ == "__main__":
    main()
