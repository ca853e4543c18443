"""What the processes of one run tell each other; a run of one process has only itself to ask."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Before any process group exists: its functions have the group as default argument. Imported later
# (torch.compile's modules do so), they keep its threads alive into the end of the interpreter,
# where a thread that lets go of a tensor aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from nerve.errors import StoreError
from nerve.spectra import SampleShares, StreamingCovariance
from nerve.spectra.covariance import Tally
from nerve.spectra.moments import Moments
from nerve.spectra.shares import Distances


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks; all of them must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * n_processes()
    dist.all_gather_object(values, value)
    return values


def dealt_back(mine: list[Any]) -> list[Any]:
    """What was dealt to the processes in turns, in its order, in process 0; in others their own.

    All of them must call it.
    """
    hands: list[Any] | None = [None] * n_processes() if rank() == 0 else None
    dist.gather_object(mine, hands)
    if hands is None:
        return mine
    in_turns = itertools.chain.from_iterable(itertools.zip_longest(*hands))
    return [item for item in in_turns if item is not None]


def own_part(parts: Sequence[Any]) -> Any:
    """Of what every process once gathered, this one's.

    Raises:
        StoreError: where there were more or fewer processes then.
    """
    if len(parts) != n_processes():
        raise StoreError(
            f"A run goes on with as many processes as it began with; its checkpoint is of "
            f"{len(parts)}, now there are {n_processes()}. Start it where it gets {len(parts)}: "
            "CUDA_VISIBLE_DEVICES or the tasks of the job decide that."
        )
    return parts[rank()]


def highest(value: int, device: torch.device) -> int:
    """The highest of every process's `value`; all of them must call it.

    Args:
        value: this process's.
        device: where the processes exchange tensors.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def add_up(tensor: Tensor) -> None:
    """Makes every process's `tensor` the sum of all; all of them must call it."""
    dist.all_reduce(tensor)


def shared_from(owner: int, tensor: Tensor) -> None:
    """Fills every process's `tensor` with that of `owner`; all of them must call it."""
    dist.broadcast(tensor, src=owner)


def reduce_covariance(covariance: StreamingCovariance, to: int, tallies: Sequence[Tally]) -> None:
    """Gives process `to` the samples of all processes.

    Every process must call it, on accumulators of one `dim`; one may have seen no samples. What the
    other processes hold afterwards means nothing, but for `n_samples` and `precision`. No process
    waits for its device.

    Args:
        covariance: this process's.
        to: the process that gets all samples.
        tallies: every process's own, in any order.
    """
    with torch.inference_mode(False), torch.no_grad():
        n, mean, scatter = covariance.moments()
        total = sum(tally.n for tally in tallies)
        common = mean * (n / max(total, 1))
        dist.all_reduce(common)
        delta = mean - common
        scatter.addr_(delta * n, delta)
        dist.reduce(scatter, to)
        covariance.replace(Moments(total, common, scatter), tallies)


def reduce_shares(
    shares: SampleShares, to: int, counts: Sequence[int], n_positions: Sequence[int]
) -> None:
    """Gives process `to` the samples of all processes.

    Every process must call it, on objects of one `dim`; one may have seen no samples. What the
    other processes hold afterwards means nothing, and none takes further samples.

    Args:
        shares: this process's.
        to: the process that gets all samples.
        counts: `n` of every process that has seen samples, in any order.
        n_positions: their `n_positions`.
    """
    with torch.inference_mode(False), torch.no_grad():
        total = sum(counts)
        mean = shares.mean * (shares.n / max(total, 1))
        dist.all_reduce(mean)
        square = shares.square_about(mean)
        dist.reduce(square, to)
        mine, reach, positions = shares.about(mean)
        length = max(shares.n_candidates(count) for count in counts)
        mine = torch.nn.functional.pad(mine, (0, length - len(mine)))
        squares = [torch.empty_like(mine) for _ in range(n_processes())]
        dist.all_gather(squares, mine)
        dist.all_reduce(reach, dist.ReduceOp.MAX)
        # One process without positions leaves none to the others.
        length = max(n_positions) if min(n_positions) else 0
        positions = torch.nn.functional.pad(positions, (0, length - positions.shape[1]))
        dist.reduce(positions, to)
        farthest = torch.cat(squares).sort(descending=True).values
        shares.replace(total, mean, square, Distances(farthest, reach, positions))
