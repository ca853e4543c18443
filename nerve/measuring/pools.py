"""Pools: rows for the samples of several FFNs of a layer, such as all experts."""

from collections.abc import Sequence

from nerve.measuring.accumulator import Accumulator
from nerve.measuring.ffns import FFNAdapter, pool_of

Pools = dict[tuple[int, str], Accumulator]
"""For each layer and name, the samples of all FFNs pooled under it."""


def pools_of(members: Sequence[Accumulator], pools: Pools) -> dict[int, Accumulator]:
    """For the index of each FFN, the accumulator of its pool, which is added to `pools` if new."""
    found = {}
    for index, member in enumerate(members):
        ffn, name = member.ffn, pool_of(member.ffn)
        if name is not None:
            pool = FFNAdapter(ffn.layer, name, ffn.pre, ffn.post, n_runs=None)
            key = (ffn.layer, name)
            found[index] = pools.setdefault(key, Accumulator(pool, shortcut=False))
    return found
