"""What the data modules share: sharded, resumable training batches and fixed held-out ones."""

from collections.abc import Callable

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor

from nerve.data.order import BatchLoader, HeldOutBatches, Order, rank_batch_size
from nerve.values import require

Batch = tuple[Tensor, Tensor]
Fetch = Callable[[np.ndarray], Batch]


class BatchDataModule(LightningDataModule):
    """Makes loaders for the processes of the trainer that the module is attached to.

    `batch_size` counts the whole batch: each of W processes takes 1/W of it, so that the batches
    of a run do not depend on the number of processes. The held-out set is not sharded: every
    process evaluates all of it and finds the same loss.
    """

    def __init__(self, *, batch_size: int, n_train_batches: int, seed: int) -> None:
        super().__init__()
        require(
            isinstance(batch_size, int) and batch_size >= 1,
            f"data.batch_size must be a whole number of at least 1; got {batch_size!r}.",
        )
        self.batch_size = batch_size
        self.n_train_batches = n_train_batches
        self.seed = seed

    def _train_loader(self, fetch: Fetch, order: Order) -> BatchLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        return BatchLoader(fetch, order, self.n_train_batches, rank=rank, world_size=world_size)

    def _heldout_batches(self, fetch: Fetch, n_items: int) -> HeldOutBatches[Batch]:
        _, world_size = self._rank_and_world_size()
        return HeldOutBatches(fetch, n_items, rank_batch_size(self.batch_size, world_size))

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size
