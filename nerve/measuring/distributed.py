"""What the processes of one run tell each other; a run of one process has only itself to ask."""

import itertools
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Before any process group exists: its functions have the group as default argument. Imported later
# (torch.compile's modules do so), they keep its threads alive into the end of the interpreter,
# where a thread that lets go of a tensor aborts the process.
import torch.distributed.nn.functional
from torch import Tensor
from torch.distributed import distributed_c10d

from nerve.errors import NotGatheredError, StoreError

BELIEVED_AFTER_S = 30.0
"""How long a process that has left is waited for all the same: it may have come back, where whoever
runs it has caught the error."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 0.05
_PAUSE = 1 / 16
"""Of the time that is waited already: so much later than it has come something is seen."""


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks; all of them must call it.

    It goes through the store of the group, so that nobody waits for a device. The first process,
    which mostly has the store, is the last to return: it may end then, and the store with it.

    Raises:
        NotGatheredError: where one of them has left, or does not come in the time that the group
            gives it.
    """
    n, mine = n_processes(), rank()
    if n == 1:
        return [value]
    with _reached():
        store = _store()
        number = store.add(f"gathered/{mine}", 1)
        store.delete_key(f"left/{mine}")  # of an error that was caught
        _put(store, f"gathered/{number}/{mine}", value)
        values = _taken(store, {other: f"gathered/{number}/{other}" for other in range(n)})
        # All have come to this one, and have read the one before.
        store.delete_key(f"gathered/{number - 1}/{mine}")
        if mine == 0:
            _take(store, {other: f"read/{number}/{other}" for other in range(1, n)})
        else:
            _put(store, f"read/{number}/{mine}", None)
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
        with _reached():
            _put(self._store, self._key(rank()), value)
        self._n += 1

    def take(self, *, wait: bool) -> list[Any] | None:
        """Of process 0: what is next from each of the others, in their order; None where some of it
        has not come, or after a wait for it, which raises as `gathered`."""
        keys = {other: self._key(other) for other in range(1, n_processes())}
        with _reached():
            if not wait and not self._store.check([*keys.values()]):
                return None
            values = _take(self._store, keys)
        self._n += 1
        return values

    def _key(self, sender: int) -> str:
        return f"{self._name}/{self._n}/{sender}"


def in_turns(hands: Sequence[Sequence[Any]]) -> list[Any]:
    """What was dealt to the processes in turns, in its order."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*hands))
    return [item for item in turns if item is not None]


def leave(error: BaseException) -> None:
    """Tells the other processes, which may wait for this one, that an error ends its part."""
    if n_processes() > 1:
        with suppress(RuntimeError):  # of a store whose process has gone
            _put(_store(), f"left/{rank()}", f"{type(error).__name__}: {error}")


@contextmanager
def _reached() -> Iterator[None]:
    """Says what it means where the store, which the first process has, cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # those of torch.distributed are
        raise NotGatheredError(
            "The processes of a run must all continue together; the first process cannot be "
            f"reached or has ended without an error message: {str(error).splitlines()[0]}"
        ) from error


def _taken(store: dist.Store, keys: Mapping[int, str]) -> list[Any]:
    """What is at the keys, each of a process, once all of it has come.

    The wait is made of short ones: within one, torch lets no signal through, and would wait as long
    for a process that has gone.
    """
    began, within_s = time.monotonic(), _timeout_of(store).total_seconds()
    while not store.check([*keys.values()]):
        waited_s = time.monotonic() - began
        if waited_s >= min(BELIEVED_AFTER_S, within_s):
            _require_there(store, keys, is_over=waited_s >= within_s)
        time.sleep(min(max(_PAUSE * waited_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
    return [pickle.loads(store.get(key)) for key in keys.values()]


def _take(store: dist.Store, keys: Mapping[int, str]) -> list[Any]:
    """The same, and it is there no longer."""
    values = _taken(store, keys)
    for key in keys.values():
        store.delete_key(key)
    return values


def _require_there(store: dist.Store, keys: Mapping[int, str], *, is_over: bool) -> None:
    """Raises `NotGatheredError` where a process that is waited for has left; `is_over` where it is
    too late for those that have not."""
    missing = [other for other, key in keys.items() if not store.check([key])]
    for other in missing:
        if store.check([f"left/{other}"]):
            told = pickle.loads(store.get(f"left/{other}"))
            raise NotGatheredError(
                f"The processes of a run must all continue together; process {other} has stopped: "
                f"{told}"
            )
    if is_over and missing:
        raise NotGatheredError(
            f"The processes of a run must all continue together; {', '.join(map(str, missing))} "
            f"did not come within {_timeout_of(store)}. See their logs; if they are only slow, "
            "increase the timeout of the process group."
        )


def _put(store: dist.Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type] # bytes as well as texts


def _store() -> dist.Store:
    """Where the processes of the group met: it reaches each of them whatever they train on."""
    return dist.PrefixStore("nerve", distributed_c10d._get_default_store())


def _timeout_of(store: dist.Store) -> timedelta:
    """What `init_process_group` was given, or torch's half an hour."""
    timeout: timedelta = store.timeout  # type: ignore[attr-defined] # missing in torch's stub
    return timeout


def own_part(parts: Sequence[Any]) -> Any:
    """Of what every process once gathered, this one's.

    Raises:
        StoreError: where there were more or fewer processes then.
    """
    if len(parts) != n_processes():
        raise StoreError(
            "A run must be resumed with as many processes as it began with; its checkpoint is of "
            f"{len(parts)} processes, now there are {n_processes()}. Start it with {len(parts)}: "
            "set CUDA_VISIBLE_DEVICES or the number of tasks of the job."
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
