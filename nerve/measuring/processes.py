"""The processes of a run, which may be a single one, and the store that all of them reach."""

import pickle
from typing import Any

import torch.distributed as dist

# Imported before any process group exists, because its functions have the group as a default
# argument. Imported later (as torch.compile's modules do), they keep the group's threads alive
# until the interpreter exits, when a thread that frees a tensor aborts the process.
import torch.distributed.nn.functional  # noqa: F401
from torch.distributed import distributed_c10d


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shared_store() -> dist.Store:
    """The store through which the processes met: it reaches all of them, whatever device they
    use."""
    return dist.PrefixStore("nerve", distributed_c10d._get_default_store())


def put(store: dist.Store, key: str, value: Any) -> None:
    """Stores any object that can be pickled."""
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type] # bytes as well as texts


def value_of(store: dist.Store, key: str) -> Any:
    """The object that was `put` there; waits for it within the timeout of the store."""
    return pickle.loads(store.get(key))
