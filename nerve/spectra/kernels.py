"""Kernels for NVIDIA GPUs: one pass over the features where torch takes several.

Importing this module imports triton, which torch installs if it is built for CUDA on Linux; check
`nerve.spectra.product.has_kernels` first.

Triton compiles a kernel once for each kind of arguments, which takes a second or more. The number
of samples may change with every batch, so it does not distinguish kinds (`do_not_specialize`).
"""

from collections.abc import Sequence
from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor

_TILE, _DEPTH = 128, 64
_MOST_ROWS = 16_384
"""Maximum number of rows that are summed in float32, piece by piece."""
_LEAST_PROGRAMS = 264
"""Minimum number of programs: two for each multiprocessor of an H200."""
_ROWS, _COLUMNS = 4, 1024
_SIDE = 64


def add_lower_products(
    total: Float64[Tensor, "dim dim"],
    pairs: Sequence[tuple[Float[Tensor, "n dim"], Float[Tensor, "n dim"]]],
    n_terms: int,
) -> None:
    """Adds the lower triangle of `a^T b`, for each pair of 16-bit matrices, to that of `total`. The
    upper triangle of `total` is undefined.

    The tensor cores sum pieces of `n_terms` products, a multiple of 64. The pieces are added in
    float32 with rounding to nearest, for at most 16,384 rows, and these sums in float64.
    """
    n, dim = pairs[0][0].shape
    side = -(-dim // _TILE)
    n_tiles = side * (side + 1) // 2
    rows = -(-n * n_tiles // _LEAST_PROGRAMS)
    rows = min(max(-(-rows // n_terms), 1) * n_terms, _MOST_ROWS)
    products = total.new_empty((len(pairs), -(-n // rows), dim, dim), dtype=torch.float32)
    with torch.cuda.device(total.device):
        for (a, b), chunks in zip(pairs, products, strict=True):
            a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
            sizes = (n, dim, a.stride(0), b.stride(0), rows, _TILE, _DEPTH, n_terms)
            _lower_tiles[n_tiles, len(chunks)](a, b, chunks, *sizes, num_warps=8, num_stages=3)
        side, n_products = -(-dim // _SIDE), products.shape[0] * products.shape[1]
        _add_lower[side, side](total, products, n_products, dim, dim * dim, _SIDE, num_warps=8)


def square_distances(
    x: Float[Tensor, "n dim"], center: Float[Tensor, " dim"]
) -> Float64[Tensor, " n"]:
    """The squared distance of each row from `center`, which is rounded to float32: differences in
    float32, sums in float64."""
    x = _with_contiguous_rows(x)
    n, dim = x.shape
    squares = x.new_empty(n, dtype=torch.float64)
    sizes = (n, dim, x.stride(0), _ROWS, _COLUMNS)
    with torch.cuda.device(x.device):
        _square_distances[-(-n // _ROWS),](x, center, squares, *sizes, num_warps=4)
    return squares


def _with_contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["n", "rows_each"])
@no_type_check
def _lower_tiles(
    a_rows,
    b_rows,
    products,
    n,
    dim,
    stride_of_a,
    stride_of_b,
    rows_each,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Computes one tile of the lower triangle, over one chunk of the rows."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)  # tiles are numbered row by row
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    column = tile - row * (row + 1) // 2
    rows = row * TILE + tl.arange(0, TILE)
    columns = column * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    first = chunk * rows_each
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for start in range(first, tl.minimum(first + rows_each, n), PIECE):
        piece = tl.zeros((TILE, TILE), dtype=tl.float32)
        for step in range(0, PIECE, DEPTH):
            samples = (start + step + depth)[:, None].to(tl.int64)
            inside = samples < n
            at = a_rows + samples * stride_of_a + rows[None, :]
            a = tl.load(at, mask=inside & (rows[None, :] < dim), other=0.0)
            at = b_rows + samples * stride_of_b + columns[None, :]
            b = tl.load(at, mask=inside & (columns[None, :] < dim), other=0.0)
            piece = tl.dot(tl.trans(a), b, piece)
        total += piece
    here = products + chunk.to(tl.int64) * dim * dim
    here += rows.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(here, total, mask=(rows[:, None] < dim) & (columns[None, :] < dim))


@triton.jit(do_not_specialize=["n_products"])
@no_type_check
def _add_lower(total, products, n_products, dim, size, SIDE: tl.constexpr):
    """Adds one square block of each of the products, unless it lies above the diagonal."""
    if tl.program_id(1) <= tl.program_id(0):
        rows = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
        columns = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
        inside = (rows[:, None] < dim) & (columns[None, :] < dim)
        at = rows.to(tl.int64)[:, None] * dim + columns[None, :]
        here = products + at
        sums = tl.load(total + at, mask=inside, other=0.0)
        for _ in range(n_products):
            sums += tl.load(here, mask=inside, other=0.0).to(tl.float64)
            here += size
        tl.store(total + at, sums, mask=inside)


@triton.jit(do_not_specialize=["n"])
@no_type_check
def _square_distances(
    x, center, squares, n, dim, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Computes the squared distances of `ROWS` rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.float64)
    for start in range(0, dim, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < dim
        mean = tl.load(center + columns, mask=inside, other=0.0).to(tl.float32)
        at = x + rows[:, None] * stride + columns[None, :]
        values = tl.load(at, mask=(rows[:, None] < n) & inside[None, :], other=0.0)
        off = tl.where(inside[None, :], values.to(tl.float32) - mean[None, :], 0.0)
        off = off.to(tl.float64)
        total += tl.sum(off * off, axis=1)
    tl.store(squares + rows, total, mask=rows < n)
