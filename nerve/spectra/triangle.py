"""Symmetric matrices of which only the lower triangle is valid, in blocks for copying."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_WIDTH = 384


def lower_blocks(matrix: Float[Tensor, "n n"]) -> list[Tensor]:
    """Views of block columns that contain the lower triangle: little more than half of the
    matrix."""
    return [matrix[s:, s : s + _WIDTH] for s in range(0, len(matrix), _WIDTH)]


def from_lower_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix of these blocks, float64; its upper triangle is undefined."""
    n = len(blocks[0]) if blocks else 0
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for number, block in enumerate(blocks):
        start = number * _WIDTH
        matrix[start:, start : start + _WIDTH] = block
    return matrix


def lower_bytes(n: int) -> int:
    """The size in bytes of the blocks of a float64 matrix `[n, n]`."""
    return 8 * sum((n - s) * min(_WIDTH, n - s) for s in range(0, n, _WIDTH))
