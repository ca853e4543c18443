"""Sends what several processes accumulated to the ones that solve it, in few collectives."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nerve.measuring.processes import n_processes, rank
from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.covariance import Tally
from nerve.spectra.moments import Moments
from nerve.spectra.shares import Distances
from nerve.spectra.triangle import lower_blocks

MOST_BYTES = 2**30
"""Maximum device memory for the copies of one collective."""


class OfCovariance(NamedTuple):
    """A covariance for which one process receives the samples of all.

    Attributes:
        covariance: this process's; it may have no samples.
        to: the process that receives the samples.
        tallies: those of every process, in any order.
    """

    covariance: StreamingCovariance
    to: int
    tallies: Sequence[Tally]

    @property
    def n(self) -> int:
        """Number of samples over all processes."""
        return sum(tally.n for tally in self.tallies)


class OfShares(NamedTuple):
    """Shares for which one process receives the samples of all.

    Attributes:
        shares: this process's; they may have no samples.
        to: the process that receives the samples.
        counts: `n` of every process that has samples, in any order.
        n_positions: their `n_positions`.
    """

    shares: SampleShares
    to: int
    counts: Sequence[int]
    n_positions: Sequence[int]

    @property
    def n(self) -> int:
        """Number of samples over all processes."""
        return sum(self.counts)

    @property
    def longest(self) -> int:
        """The positions that all have; a process without any reduces them to none."""
        return max(self.n_positions) if min(self.n_positions) else 0

    @property
    def n_candidates(self) -> int:
        """The largest number that one process holds."""
        return max(self.shares.n_candidates(count) for count in self.counts)


def exchange(covariances: Sequence[OfCovariance], shares: Sequence[OfShares]) -> None:
    """Reduces each of them to its process, with the samples of all processes.

    Every process must call it, with the same items in the same order. Afterwards the values in the
    other processes are meaningless, except for `n_samples` and `precision`, and shares accept no
    more samples. No process waits for its device: there is one collective for all means, one for
    all candidates, and one sum for each receiving process, or several if it exceeds `MOST_BYTES`.
    """
    with torch.inference_mode(False), torch.no_grad():
        moments = [each.covariance.moments() for each in covariances]
        own = [m.mean * (m.n / max(e.n, 1)) for e, m in zip(covariances, moments, strict=True)]
        own += [each.shares.mean * (each.shares.n / max(each.n, 1)) for each in shares]
        means = iter(_of_all(own))
        sums: dict[int, list[Tensor]] = defaultdict(list)
        for of, (n, mean, scatter) in zip(covariances, moments, strict=True):
            common = next(means)
            delta = mean - common
            scatter.addr_(delta * n, delta)
            sums[of.to] += lower_blocks(scatter)
            of.covariance.replace(Moments(of.n, common, scatter), of.tallies)
        distances = [_about(each, next(means), sums[each.to]) for each in shares]
        for to, tensors in sorted(sums.items()):
            _add_up_at(to, tensors)
        for each, found, everyone in zip(
            shares, distances, _of_each([d.mine for d in distances]), strict=True
        ):
            farthest = everyone[:, 1:].flatten().sort(descending=True).values
            of_all = Distances(farthest, everyone[:, 0].max(), found.positions)
            each.shares.replace(each.n, found.mean, found.square, of_all)


class _About(NamedTuple):
    """Distances of one process's samples from the mean of all.

    Attributes:
        mean, square, positions: as in `SampleShares`; the last two become those of all samples.
        mine: the reach, and the distances of the candidates, as many as any process has.
    """

    mean: Tensor
    square: Tensor
    positions: Tensor
    mine: Tensor


def _about(each: OfShares, mean: Tensor, sums: list[Tensor]) -> _About:
    """The distances from `mean`; what must be summed over processes is added to `sums`."""
    square = each.shares.square_about(mean)
    farthest, reach, positions = each.shares.about(mean)
    farthest = torch.nn.functional.pad(farthest, (0, each.n_candidates - len(farthest)))
    positions = torch.nn.functional.pad(positions, (0, each.longest - positions.shape[1]))
    positions = positions.contiguous()
    sums += [square, positions]
    return _About(mean, square, positions, torch.cat([reach[None], farthest]))


def _of_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over all processes."""
    if not tensors:
        return []
    flat = _flat(tensors, tensors[0].device)
    dist.all_reduce(flat)
    return _like(tensors, flat)


def _add_up_at(to: int, tensors: Sequence[Tensor]) -> None:
    """Replaces tensors of process `to` by the sums over all processes."""
    for some in _within(MOST_BYTES, tensors):
        flat = _flat(some, some[0].device)
        dist.reduce(flat, to)
        if rank() == to:
            for tensor, total in zip(some, _like(some, flat), strict=True):
                tensor.copy_(total)


def _of_each(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of every process, one row per process."""
    if not tensors:
        return []
    flat = _flat(tensors, tensors[0].device)
    rows = [torch.empty_like(flat) for _ in range(n_processes())]
    dist.all_gather(rows, flat)
    split = [_like(tensors, row) for row in rows]
    return [torch.stack(each) for each in zip(*split, strict=True)]


def _within(most_bytes: int, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """All tensors in order, in lists of at most `most_bytes`, or of one tensor."""
    some: list[Tensor] = []
    n_bytes = 0
    for tensor in tensors:
        if some and n_bytes + tensor.nbytes > most_bytes:
            yield some
            some, n_bytes = [], 0
        some.append(tensor)
        n_bytes += tensor.nbytes
    if some:
        yield some


def _flat(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([tensor.to(device).reshape(-1) for tensor in tensors])


def _like(tensors: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """The parts of `flat` in the shapes and on the devices of `tensors`."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [p.view(t.shape).to(t.device) for p, t in zip(parts, tensors, strict=True)]
