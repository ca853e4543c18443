"""Whether processes that share a GPU survive Muon's products: with the addition in cuBLAS's kernel,
as torch.optim.Muon forms them, and as nerve does.

Each process updates the matrices of a 12-layer GPT of width 512 over and over, with two other
kernels after each shape. Processes that a CUDA error ends are counted and not replaced.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nerve.optim.muon import orthogonalized

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((1536, 512), (512, 512), (2048, 512), (512, 2048))

Update = Callable[[Tensor, tuple[float, float, float], int, float], Tensor]


def added_in_the_kernel(
    matrices: Tensor, coefficients: tuple[float, float, float], n_steps: int, eps: float
) -> Tensor:
    a, b, c = coefficients
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


UPDATES: dict[str, Update] = {"kernel": added_in_the_kernel, "nerve": orthogonalized}


def repeat(update: Update, seconds: float) -> int:
    """Updates until the time is over; returns how often."""
    momenta = [torch.randn(12, *shape, device="cuda", dtype=torch.bfloat16) for shape in SHAPES]
    large = torch.randn(2**26, device="cuda")
    x, w = (torch.randn(n, 2048, device="cuda", dtype=torch.bfloat16) for n in (8192, 2048))
    n, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for each in momenta:
            update(each, COEFFICIENTS, 5, 1e-7)
            large.mul_(1.0)
            x @ w
        torch.cuda.synchronize()
        n += 1
    return n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each way, at most")
    parser.add_argument("--ways", nargs="+", choices=list(UPDATES), default=list(UPDATES))
    parser.add_argument("--one", choices=list(UPDATES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(repeat(UPDATES[arguments.one], arguments.seconds))
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
        errors = [said for process, (_, said) in ended if process.returncode]
        updates = [int(told) for told, _ in outputs if told]
        print(f"{way}: {len(errors)} of {len(processes)} ended by an error; updates: {updates}")
        for said in errors:
            print(
                "   ", next((line for line in said.splitlines() if "Error:" in line), said[-200:])
            )


if __name__ == "__main__":
    main()
