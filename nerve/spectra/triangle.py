"""Symmetric matrices of which the lower triangle alone counts, in the parts that are moved."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_WIDTH = 384


def lower_blocks(matrix: Float[Tensor, "n n"]) -> list[Tensor]:
    """Views of block columns that hold the lower triangle: little more than half of the matrix."""
    return [matrix[s:, s : s + _WIDTH] for s in range(0, len(matrix), _WIDTH)]


def from_lower_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """The matrix again, float64; what its upper triangle holds means nothing."""
    n = len(blocks[0]) if blocks else 0
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for number, block in enumerate(blocks):
        start = number * _WIDTH
        matrix[start:, start : start + _WIDTH] = block
    return matrix


def lower_bytes(n: int) -> int:
    """What the blocks of a float64 `[n, n]` take."""
    return 8 * sum((n - s) * min(_WIDTH, n - s) for s in range(0, n, _WIDTH))
