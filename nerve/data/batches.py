"""The order of items in batches, the loaders, and the base class of the data modules."""

from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from nerve.config import require

T = TypeVar("T")


class Order(Protocol):
    """Which items make up each batch of an endless stream of batches."""

    batch_size: int

    def indices(self, i: int) -> np.ndarray:
        """The items of batch `i`, int64 `[batch_size]`."""
        ...


class ShuffledOrder:
    """An endless stream of batches in which every item appears exactly once per epoch.

    Epoch e is the permutation that sorts `random_bits(n_items, seed, e)`. The epochs are
    concatenated and cut into batches: a batch may straddle epochs, all batches have the same size,
    and batch i is computed without the batches before it.

    Args:
        n_items: at least 1.
        batch_size: items per batch, over all ranks; at least 1, and may exceed `n_items`.
        seed: at least 0.
    """

    def __init__(self, n_items: int, batch_size: int, seed: int) -> None:
        require(n_items >= 1, f"n_items must be at least 1; got {n_items}.")
        require(batch_size >= 1, f"batch_size must be at least 1; got {batch_size}.")
        require(seed >= 0, f"seed must not be negative; got {seed}.")
        self.n_items = n_items
        self.batch_size = batch_size
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, i: int) -> np.ndarray:
        """The items of batch `i`, int64 `[batch_size]`."""
        first, stop = i * self.batch_size, (i + 1) * self.batch_size
        pieces = []
        while first < stop:
            epoch, offset = divmod(first, self.n_items)
            piece = self._permutation(epoch)[offset : offset + stop - first]
            pieces.append(piece)
            first += len(piece)
        return np.concatenate(pieces)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            # The previous one is kept for a batch that straddles epochs; each takes 8 bytes per
            # item.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = random_bits(self.n_items, self.seed, epoch).argsort(
                kind="stable"
            )
        return self._permutations[epoch]


class BatchLoader(Generic[T]):
    """A sized iterable over the batches of an order that can be stopped and resumed anywhere.

    The state is the index of the next batch, which is one more than that of the batch returned
    last: a state saved after training on batch k - 1, before batch k is requested, resumes with
    batch k. Iteration continues from that position; after the last batch, it starts at 0 again.

    Lightning itself saves and restores the state with the checkpoint (`CombinedLoader`), and does
    not prefetch from a loader that has a length. A checkpoint written in the middle of a step (by
    an exception handler) counts that step's batch as consumed.

    Args:
        fetch: returns the batch for item indices, int64 `[batch_size / world_size]`.
        order: determines the items of each global batch.
        n_batches: the length, regardless of the position.
        rank: this process takes the rank-th of `world_size` slices of each global batch.
        world_size: must divide `order.batch_size`.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray], T],
        order: Order,
        n_batches: int,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require(n_batches >= 1, f"n_train_batches must be at least 1; got {n_batches}.")
        size = rank_batch_size(order.batch_size, world_size)
        self._fetch = fetch
        self._order = order
        self._n_batches = n_batches
        self._rows = slice(rank * size, (rank + 1) * size)
        self._position = 0

    def __len__(self) -> int:
        return self._n_batches

    def __iter__(self) -> Iterator[T]:
        if self._position >= self._n_batches:
            self._position = 0
        while self._position < self._n_batches:
            batch = self._fetch(self._order.indices(self._position)[self._rows])
            self._position += 1  # before `yield`, so that the batch counts once it is returned
            yield batch

    def state_dict(self) -> dict[str, int]:
        """`{"position": index of the next batch}`."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration start at the saved position."""
        self._position = state["position"]


class HeldOutBatches(Generic[T]):
    """Items 0 to `n_items` - 1 in order, each once; every iteration starts at 0.

    All batches have `batch_size` items; the last may have fewer.
    """

    def __init__(self, fetch: Callable[[np.ndarray], T], n_items: int, batch_size: int) -> None:
        self._fetch = fetch
        self._n_items = n_items
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._n_items // self._batch_size)

    def __iter__(self) -> Iterator[T]:
        for first in range(0, self._n_items, self._batch_size):
            yield self._fetch(np.arange(first, min(first + self._batch_size, self._n_items)))


def random_bits(n: int, *key: int) -> np.ndarray:
    """`n` random uint64 that depend only on `key`; no global state is read or written.

    These are raw bits of Philox, which NumPy guarantees to be the same in every version, unlike the
    numbers that its `Generator` derives from them.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def rank_batch_size(batch_size: int, world_size: int) -> int:
    """The number of items of each global batch that one process takes.

    Raises:
        ConfigError: if the processes cannot share a batch equally.
    """
    larger = -(-batch_size // world_size) * world_size
    require(
        batch_size % world_size == 0,
        "data.batch_size counts the items of all processes and must be divisible by their "
        f"number; got {batch_size} for {world_size} processes. Try {larger}.",
    )
    return batch_size // world_size


def pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, made by this thread alone: torch's threads would take longer while
    other threads solve spectra, in particular if they spin while they wait."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    np.copyto(copy.numpy(), tensor.numpy())
    return copy


Batch = tuple[Tensor, Tensor]
Fetch = Callable[[np.ndarray], Batch]


class BatchDataModule(LightningDataModule):
    """Makes loaders for the processes of the trainer that the module is attached to.

    `batch_size` counts the items of all processes: each of W processes takes 1/W of a batch, so the
    batches of a run do not depend on the number of processes. The held-out set is not sharded:
    every process evaluates all of it and obtains the same loss.
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

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Pins a batch on its way to a GPU, so that the copy overlaps with the GPU's work;
        otherwise the host would wait for the GPU."""
        if self.trainer is None or self.trainer.strategy.root_device.type != "cuda":
            return batch
        inputs, targets = batch
        return pinned(inputs), pinned(targets)

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
