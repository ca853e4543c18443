"""Which FFNs are measured in one pass over the batches, so that their matrices fit into memory."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from nerve.config import require
from nerve.errors import MeasurementError
from nerve.measuring.ffns import FFN, named, pool_of, sites_of

ON_CPU = 8 * 2**30
"""Default for the bytes of matrices held at once, on a CPU; on a GPU it is half of the free
memory."""

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{infix}b": base**power
    for power, prefix in enumerate("kmgt", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
_NUMBER = 8  # bytes of float64
_AT_WORK = 4  # temporary matrices: for a chunk, a merge, an eigenproblem


class Pass(NamedTuple):
    """FFNs that are measured together.

    Attributes:
        indices: the indices of the FFNs.
        open_pools: layer and name of pools that have members in a later pass, too.
    """

    indices: list[int]
    open_pools: set[tuple[int, str]]


def bytes_of(memory: int | str) -> int:
    """A number of bytes, from a number or a string such as `8GiB` or `500 MB`.

    Raises:
        ConfigError: for anything else.
    """
    text = str(memory)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    known = match is not None and match[2] in _UNITS and not isinstance(memory, bool)
    n = int(float(match[1]) * _UNITS[match[2]]) if match is not None and known else 0
    require(n > 0, f"memory must be a number of bytes, or a string such as '8GiB'; got {memory!r}.")
    return n


def passes(
    ffns: Sequence[FFN], model: nn.Module, memory: int | str | None, n_matrices: int = 1
) -> list[Pass]:
    """The fewest passes that memory allows, with FFNs in order.

    An FFN needs two d_ff x d_ff matrices in float64 (two for each group), as does a pool in each
    pass that has one of its members; the widest one needs four more, for temporaries.

    Args:
        ffns: the FFNs.
        model: the model, whose device determines the default.
        memory: bytes of matrices at once, as in `bytes_of`; None for the default.
        n_matrices: number of matrices for each side of an FFN whose samples are grouped.

    Raises:
        MeasurementError: if one FFN alone does not fit into the given `memory`.
    """
    known = memory is not None
    limit = _default(model) if memory is None else bytes_of(memory)
    sizes = [_matrix(ffn) for ffn in ffns]
    found: list[list[int]] = []
    held, widest, pools = 0, 0, set[tuple[int, str]]()
    for index, (ffn, size) in enumerate(zip(ffns, sizes, strict=True)):
        pool = pool_of(ffn)
        key = None if pool is None else (ffn.layer, pool)
        more = 2 * size * (n_matrices if key is None or key in pools else n_matrices + 1)
        if not found or held + more + _AT_WORK * max(widest, size) > limit:
            more = 2 * size * (n_matrices if key is None else n_matrices + 1)
            alone = more + _AT_WORK * size
            if known and alone > limit:
                raise MeasurementError(
                    f"memory must be enough for the matrices of one FFN; {named(ffn)} needs "
                    f"{alone / 2**30:.3g} GiB, memory is {limit / 2**30:.3g} GiB."
                )
            found.append([])
            held, widest, pools = 0, 0, set()
        found[-1].append(index)
        held, widest = held + more, max(widest, size)
        if key is not None:
            pools.add(key)
    return [
        Pass(indices, _pools(ffns, indices) & _pools(ffns, range(indices[-1] + 1, len(ffns))))
        for indices in found
    ]


def _pools(ffns: Sequence[FFN], indices: Sequence[int]) -> set[tuple[int, str]]:
    each = ((ffns[index].layer, pool_of(ffns[index])) for index in indices)
    return {(layer, pool) for layer, pool in each if pool is not None}


def _matrix(ffn: FFN) -> int:
    """Bytes of a d_ff x d_ff matrix; 0 if no module declares the width."""
    pre, post = sites_of(ffn)
    return _NUMBER * (post.width or pre.width or 0) ** 2


def _default(model: nn.Module) -> int:
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return free // 2
