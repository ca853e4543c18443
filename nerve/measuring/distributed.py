"""What the processes of one run tell each other; a run of one process has only itself to ask."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nerve.errors import StoreError


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks; all of them must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_part(parts: Sequence[Any]) -> Any:
    """Of what every process once gathered, this one's.

    Raises:
        StoreError: where there were more or fewer processes then.
    """
    n_processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if len(parts) != n_processes:
        raise StoreError(
            f"A run goes on with as many processes as it began with; its checkpoint is of "
            f"{len(parts)}, now there are {n_processes}. Start it where it gets {len(parts)}: "
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


class WeightedMean:
    """Mean of losses weighted by their targets, in float64, without waiting for the device."""

    def __init__(self, total: Tensor | float = 0.0, weight: int = 0) -> None:
        self._total = total
        self._weight = weight

    def add(self, loss: Tensor, n_targets: int) -> None:
        self._total = self._total + loss.double() * n_targets
        self._weight += n_targets

    def value(self, *, over_processes: bool = False) -> float | None:
        """The mean, of all processes' losses together if asked for; None without any."""
        if not self._weight:
            return None
        sums = torch.as_tensor(self._total).new_tensor([float(self._total), self._weight])
        if over_processes:
            dist.all_reduce(sums)
        return float(sums[0] / sums[1])

    def state(self) -> tuple[float, int]:
        return float(self._total), self._weight
