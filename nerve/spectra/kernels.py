"""Kernels for NVIDIA GPUs: one pass over features where torch takes several.

To import this module is to import triton, which torch brings along where it is built for CUDA on
Linux: ask `nerve.spectra.product.has_kernels` first.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32, Float64
from torch import Tensor

PIECE = 512
"""Rows whose products the tensor cores sum on their own; see `nerve.spectra.product`."""

_TILE, _DEPTH = 128, 64
_MOST_ROWS = 16_384
"""Rows that are summed in float32, piece by piece."""
_LEAST_PROGRAMS = 264
"""Two for each multiprocessor of an H200."""
_ROWS, _COLUMNS = 4, 1024


def lower_products(x: Float[Tensor, "n dim"]) -> Float32[Tensor, "chunks dim dim"]:
    """`x^T x` of chunks of the rows of 16-bit features. The lower triangles count; what the upper
    ones hold means nothing.

    The tensor cores sum pieces of 512 products, which float32 adds up with rounding to nearest,
    over at most 16,384 rows.
    """
    x = _with_columns_together(x)
    n, dim = x.shape
    side = -(-dim // _TILE)
    n_tiles = side * (side + 1) // 2
    rows = -(-n * n_tiles // _LEAST_PROGRAMS)
    rows = min(max(-(-rows // PIECE), 1) * PIECE, _MOST_ROWS)
    products = x.new_empty((-(-n // rows), dim, dim), dtype=torch.float32)
    sizes = (n, dim, x.stride(0), rows, _TILE, _DEPTH, PIECE)
    with torch.cuda.device(x.device):
        _lower_tiles[n_tiles, len(products)](x, products, *sizes, num_warps=8, num_stages=3)
    return products


def square_distances(
    x: Float[Tensor, "n dim"], center: Float32[Tensor, " dim"]
) -> Float64[Tensor, " n"]:
    """The squared distance of each row from `center`: differences of float32, sums of float64."""
    x = _with_columns_together(x)
    n, dim = x.shape
    squares = x.new_empty(n, dtype=torch.float64)
    sizes = (n, dim, x.stride(0), _ROWS, _COLUMNS)
    with torch.cuda.device(x.device):
        _square_distances[-(-n // _ROWS),](x, center, squares, *sizes, num_warps=4)
    return squares


def _with_columns_together(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
@no_type_check
def _lower_tiles(
    x,
    products,
    n,
    dim,
    stride,
    rows_each,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    PIECE: tl.constexpr,
):
    """One tile of the lower triangle, over one chunk of the rows."""
    tile = tl.program_id(0)
    chunk = tl.program_id(1)
    row = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)  # tiles count row by row
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
            samples = (start + step + depth)[:, None]
            at = x + samples.to(tl.int64) * stride
            inside = samples < n
            a = tl.load(at + rows[None, :], mask=inside & (rows[None, :] < dim), other=0.0)
            b = tl.load(at + columns[None, :], mask=inside & (columns[None, :] < dim), other=0.0)
            piece = tl.dot(tl.trans(a), b, piece)
        total += piece
    here = products + chunk.to(tl.int64) * dim * dim
    here += rows.to(tl.int64)[:, None] * dim + columns[None, :]
    tl.store(here, total, mask=(rows[:, None] < dim) & (columns[None, :] < dim))


@triton.jit
@no_type_check
def _square_distances(
    x, center, squares, n, dim, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Those of some rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), dtype=tl.float64)
    for start in range(0, dim, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < dim
        mean = tl.load(center + columns, mask=inside, other=0.0)
        at = x + rows[:, None] * stride + columns[None, :]
        values = tl.load(at, mask=(rows[:, None] < n) & inside[None, :], other=0.0)
        off = tl.where(inside[None, :], values.to(tl.float32) - mean[None, :], 0.0)
        off = off.to(tl.float64)
        total += tl.sum(off * off, axis=1)
    tl.store(squares + rows, total, mask=rows < n)
