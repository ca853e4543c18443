"""What the processes of one run tell each other; a run of one process has only itself to ask."""

import itertools
import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

# Before any process group exists: its functions have the group as default argument. Imported later
# (torch.compile's modules do so), they keep its threads alive into the end of the interpreter,
# where a thread that lets go of a tensor aborts the process.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import distributed_c10d

from nerve.errors import StoreError


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks; all of them must call it.

    It goes through the store of the group, so that nobody waits for a device.
    """
    n, mine = n_processes(), rank()
    if n == 1:
        return [value]
    store = _store()
    number = store.add(f"gathered/{mine}", 1)
    _put(store, f"gathered/{number}/{mine}", value)
    values = [pickle.loads(store.get(f"gathered/{number}/{other}")) for other in range(n)]
    # All have come to this one, and have read the one before.
    store.delete_key(f"gathered/{number - 1}/{mine}")
    return values


class Mailbox:
    """Takes objects to process 0, which takes them when they are there: no process waits.

    Every process must make its own at the same place among those that it makes.
    """

    def __init__(self) -> None:
        self._store = _store()
        number = self._store.add(f"mailboxes/{rank()}", 1)
        self._name = f"mailbox/{number}"
        self._n = 0

    def send(self, value: Any) -> None:
        """Of another process: what process 0 takes next from it."""
        _put(self._store, self._key(rank()), value)
        self._n += 1

    def take(self, *, wait: bool) -> list[Any] | None:
        """Of process 0: what is next from each of the others, in their order; None where some of it
        has not come, or after a wait for it."""
        keys = [self._key(other) for other in range(1, n_processes())]
        if not wait and not self._store.check(keys):
            return None
        values = [pickle.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        self._n += 1
        return values

    def _key(self, sender: int) -> str:
        return f"{self._name}/{self._n}/{sender}"


def in_turns(hands: Sequence[Sequence[Any]]) -> list[Any]:
    """What was dealt to the processes in turns, in its order."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*hands))
    return [item for item in turns if item is not None]


def _put(store: dist.Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type] # bytes as well as texts


def _store() -> dist.Store:
    """Where the processes of the group met: it reaches each of them whatever they train on."""
    return dist.PrefixStore("nerve", distributed_c10d._get_default_store())


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
