"""Combines the samples of all processes: each process gets the FFNs of its share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nerve.measuring.accumulator import Accumulator, Side
from nerve.measuring.collectives import shared_from
from nerve.measuring.exchange import OfCovariance, OfShares, exchange
from nerve.measuring.messages import gathered
from nerve.measuring.parts import Key
from nerve.sites_and_groups import SITES
from nerve.spectra.covariance import Tally


class _Seen(NamedTuple):
    """What one process has seen of an FFN, as numbers that others can read."""

    altered: bool
    took_pre: bool
    d_in: int | None
    weight: torch.dtype | None
    of_input: bool
    covariances: dict[Side, tuple[int, Tally]]
    parts: dict[Key, tuple[int, Tally]]
    n_positions: int | None


def reduce(accumulators: Sequence[Accumulator], n_forwards: int) -> int:
    """Distributes the FFNs over the processes in turns, each with the samples of all.

    Every process must call it, with accumulators of the same FFNs, even one that has seen nothing.

    Args:
        n_forwards: number of forward passes that this process has measured.

    Returns:
        The number over all processes.
    """
    everyone, numbers = _seen_by_all(accumulators, n_forwards)
    if _leave_weights(accumulators, everyone):
        everyone, numbers = _seen_by_all(accumulators, n_forwards)
    covariances: list[OfCovariance] = []
    shares: list[OfShares] = []
    for index, each in enumerate(accumulators):
        seen, to = [those[index] for those in everyone], index % len(everyone)
        _prepare(each, seen, to, covariances, shares)
    exchange(covariances, shares)
    for index, each in enumerate(accumulators):
        _share_weight(each, [seen[index] for seen in everyone])
    return sum(numbers)


def _seen_by_all(
    accumulators: Sequence[Accumulator], n_forwards: int
) -> tuple[list[list[_Seen]], list[int]]:
    """What each process has seen of each FFN, and its number of forward passes."""
    everyone = gathered(([_seen(each) for each in accumulators], n_forwards))
    return [seen for seen, _ in everyone], [n for _, n in everyone]


def _leave_weights(
    accumulators: Sequence[Accumulator], everyone: Sequence[Sequence[_Seen]]
) -> bool:
    """Uses pre itself if another process does; returns whether some process had to change."""
    has_changed = False
    for index, each in enumerate(accumulators):
        if {seen[index].altered for seen in everyone} == {True, False}:
            has_changed = True
            each.leave_weight()
        if {seen[index].took_pre for seen in everyone} == {True, False}:
            has_changed = True
            each.take_pre()
    return has_changed


def _seen(each: Accumulator) -> _Seen:
    covariances = {side: (c.dim, c.tally()) for side, c in each.covariances.items()}
    parts = {key: (c.dim, c.tally()) for key, c in each.parts.covariances.items()}
    n_positions = each.shares["pre"].n_positions if each.shares else None
    weight = None if each.weight is None else each.weight.dtype
    return _Seen(
        each.altered,
        each.took_pre,
        each.d_in,
        weight,
        each.of_input,
        covariances,
        parts,
        n_positions,
    )


def _prepare(
    mine: Accumulator,
    everyone: Sequence[_Seen],
    to: int,
    covariances: list[OfCovariance],
    shares: list[OfShares],
) -> None:
    """Makes this process's accumulator hold what that of any process holds, and lists it."""
    sides: tuple[Side, ...] = ("input", "post", "pre")
    lengths = [seen.n_positions for seen in everyone if seen.n_positions is not None]
    for seen in everyone:
        mine.d_in = seen.d_in if mine.d_in is None else mine.d_in
        mine.of_input |= seen.of_input
    for side in sides:
        theirs = [seen.covariances[side] for seen in everyone if side in seen.covariances]
        if not theirs:
            continue
        covariance = mine.covariance(side, theirs[0][0], mine.device)
        tallies = [tally for _, tally in theirs]
        covariances.append(OfCovariance(covariance, to, tallies))
        for of in SITES if side == "post" else ():
            own = mine.sample_shares(of, covariance.dim, covariance.device)
            shares.append(OfShares(own, to, [tally.n for tally in tallies], lengths))
    for key in sorted({key for seen in everyone for key in seen.parts}):
        theirs = [seen.parts[key] for seen in everyone if key in seen.parts]
        covariance = mine.parts.covariance(key, theirs[0][0], mine.device)
        covariances.append(OfCovariance(covariance, to, [tally for _, tally in theirs]))


def _share_weight(mine: Accumulator, everyone: Sequence[_Seen]) -> None:
    """Gives the weight to the processes that saw no forward pass."""
    dtypes = [seen.weight for seen in everyone]
    owner = next((rank for rank, dtype in enumerate(dtypes) if dtype is not None), None)
    if owner is None or None not in dtypes:
        return
    if mine.weight is None:
        assert mine.d_in is not None
        post = mine.covariances["post"]
        size = (post.dim, mine.d_in)
        mine.weight = torch.empty(size, dtype=dtypes[owner], device=post.device)
    shared_from(owner, mine.weight)
