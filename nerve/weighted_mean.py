"""Means of losses over batches of different sizes."""

import torch
import torch.distributed as dist
from torch import Tensor


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
