"""The kernels of nerve.spectra against what torch has: time, and the error of both.

The product of 16-bit features with themselves, and their distances from the mean; for the product
also tiles, warps and stages other than those that were chosen, with `--variants`.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nerve.spectra import kernels
from nerve.spectra.product import _tensor_core_matmul, add_lower


def milliseconds(run: Callable[[], object], repeats: int) -> list[float]:
    times = []
    for repeat in range(repeats + 2):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        run()
        events[1].record()
        torch.cuda.synchronize()
        if repeat > 1:
            times.append(events[0].elapsed_time(events[1]))
    return times


Pairs = list[tuple[Tensor, Tensor]]


def by_torch(pairs: Pairs, n_terms: int) -> Tensor:
    """The sum of `a^T b`, in pieces that float32 adds up."""
    total = zeros(pairs)
    for a, b in pairs:
        for rows in zip(a.split(16_384), b.split(16_384), strict=True):
            add_lower(total, *rows, _tensor_core_matmul(n_terms))
    return total


def by_kernel(pairs: Pairs, n_terms: int) -> Tensor:
    total = zeros(pairs)
    kernels.add_lower_products(total, pairs, n_terms)
    return total


def zeros(pairs: Pairs) -> Tensor:
    dim = pairs[0][0].shape[1]
    return torch.zeros(dim, dim, dtype=torch.float64, device="cuda")


def distances_by_torch(x: Tensor, center: Tensor) -> Tensor:
    pieces = [
        torch.linalg.vector_norm(rows - center, dim=1, dtype=torch.float64)
        for rows in x.split(8192)
    ]
    return torch.cat(pieces).square()


def print_result(
    name: str, run: Callable[[], Tensor], expected: Tensor, repeats: int, flop: float
) -> None:
    times = milliseconds(run, repeats)
    error = ((run() - expected).tril() if expected.ndim > 1 else run() - expected).abs().max()
    rate = f", {flop / statistics.mean(times) / 1e9:.0f} TFLOP/s" if flop else ""
    print(
        f"  {name}: {statistics.mean(times):.3f} ms, worst {max(times):.3f}{rate}; error "
        f"{error / expected.abs().max():.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--variants", action="store_true")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for n, dim in ((65_536, 3072), (16_384, 2048), (16_384, 4096), (4096, 512)):
        x = torch.randn(n, dim, device="cuda") * torch.linspace(0.1, 2, dim, device="cuda")
        x = torch.nn.functional.gelu(x).bfloat16()
        print(f"{n:,} × {dim}")
        flop = n * dim * (dim + 1.0)
        y = x.float() * 1000
        high = y.half()
        low = (y - high).half()
        of_two = [(high, high), (high, low), (low, high)]
        for name, pairs, n_terms in (("bfloat16", [(x, x)], 512), ("float16x2", of_two, 256)):
            exact = sum(a.double().T @ b.double() for a, b in pairs)
            for way, run in (("torch", by_torch), ("kernel", by_kernel)):
                each = partial(run, pairs, n_terms)
                print_result(f"{name}, {way}", each, exact, args.repeats, flop * len(pairs))
        center = x.double().mean(0).float()
        far = (x.double() - center.double()).square().sum(1)
        for name, run in (
            ("torch", distances_by_torch),
            ("kernel", kernels.square_distances),
        ):
            print_result(f"distances, {name}", partial(run, x, center), far, args.repeats, 0)
        if args.variants and dim == 3072:
            variants(x, x.double().T @ x.double(), args.repeats, flop)


class Tiles:
    """The kernel of products with other sizes than it has by itself.

    Args:
        inner: the kernel.
        dim: width of the features.
        tile, depth: sides of the blocks that a program takes.
        options: warps and stages.
    """

    def __init__(self, inner: Any, dim: int, tile: int, depth: int, **options: int) -> None:
        self._inner, self._options = inner, options
        self._tile, self._depth = tile, depth
        side = -(-dim // tile)
        self._n_tiles = side * (side + 1) // 2

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(a: Tensor, b: Tensor, out: Tensor, *sizes: int, **options: int) -> None:
            sizes = (*sizes[:5], self._tile, self._depth, sizes[7])
            self._inner[self._n_tiles, grid[1]](a, b, out, *sizes, **self._options)

        return launch


def variants(x: Tensor, exact: Tensor, repeats: int, flop: float) -> None:
    inner = kernels._lower_tiles
    for tile, depth, warps, stages in itertools.product(
        (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    ):
        if stages * depth * tile * 4 > 220_000 or (tile, warps) == (128, 4):
            continue
        options = {"num_warps": warps, "num_stages": stages}
        kernels._lower_tiles = Tiles(inner, x.shape[1], tile, depth, **options)
        try:
            name = f"tile {tile}, depth {depth}, {warps} warps, {stages} stages"
            print_result(name, partial(by_kernel, [(x, x)], 512), exact, repeats, flop)
        except Exception as error:
            print(f"  {tile, depth, warps, stages}: {type(error).__name__}: {str(error)[:80]}")
        finally:
            kernels._lower_tiles = inner


if __name__ == "__main__":
    main()
