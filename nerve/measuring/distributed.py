"""Communication between the hosts of the processes of a run, which may be a single one."""

import itertools
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

# Imported before any process group exists, because its functions have the group as a default
# argument. Imported later (as torch.compile's modules do), they keep the group's threads alive
# until the interpreter exits, when a thread that frees a tensor aborts the process.
import torch.distributed.nn.functional  # noqa: F401
from torch.distributed import distributed_c10d

from nerve.errors import NotGatheredError, StoppedError, StoreError, first_line

TOGETHER = "The processes of a run must all continue together"

_GLOO = "/gloo/"
"""A part of the messages of gloo, whose errors have no type of their own."""

BELIEVED_AFTER_S = 30.0
"""How long to keep waiting for a process that has left: it may return if its error was caught."""

TOLD_WITHIN_S = 1.0
"""How long to wait for the reason of a process that has closed its connection."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 0.05
_PAUSE = 1 / 16
"""Polling interval as a fraction of the time waited so far, so that a result is noticed with at
most this relative delay."""


class Exit(NamedTuple):
    """How a process has exited.

    Attributes:
        how: in words: `was killed by SIGKILL`.
        is_stop: whether because it was asked to stop.
    """

    how: str
    is_stop: bool = False


_exits: Mapping[int, Exit] = {}
"""The processes that are known to have exited, by rank: see `knowing_others`."""


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def n_processes() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered(value: Any) -> list[Any]:
    """Every process's `value`, in the order of their ranks; all of them must call it.

    It goes through the store of the process group, so that no one waits for a device. The first
    process, which usually hosts the store, returns last: it may exit then, and the store with it.

    Raises:
        NotGatheredError: if one of them has left, or does not arrive within the group's timeout.
    """
    n, mine = n_processes(), rank()
    if n == 1:
        return [value]
    with _reached():
        store = _store()
        number = store.add(f"gathered/{mine}", 1)
        store.delete_key(f"left/{mine}")  # left by an error that was caught
        _put(store, f"gathered/{number}/{mine}", value)
        values = _taken(store, {other: f"gathered/{number}/{other}" for other in range(n)})
        # All have arrived here, so they have read the previous values.
        store.delete_key(f"gathered/{number - 1}/{mine}")
        if mine == 0:
            _take(store, {other: f"read/{number}/{other}" for other in range(1, n)})
        else:
            _put(store, f"read/{number}/{mine}", None)
    return values


class Mailbox:
    """Sends objects to process 0, which takes them when they have arrived: no process waits.

    Every process must create its mailboxes in the same order.
    """

    def __init__(self) -> None:
        self._store = _store()
        number = self._store.add(f"mailboxes/{rank()}", 1)
        self._name = f"mailbox/{number}"
        self._n = 0

    def send(self, value: Any) -> None:
        """For other processes: sends the next object to process 0."""
        with _reached():
            _put(self._store, self._key(rank()), value)
        self._n += 1

    def take(self, *, wait: bool) -> list[Any] | None:
        """For process 0: the next object of each other process, in order of rank; None if some have
        not arrived. With `wait` it waits for them, and raises as `gathered` does."""
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
    """Restores the order of what was dealt to the processes in turns."""
    turns = itertools.chain.from_iterable(itertools.zip_longest(*hands))
    return [item for item in turns if item is not None]


def leave(error: BaseException) -> None:
    """Tells the other processes, which may wait for this one, that it stops with an error."""
    if n_processes() > 1:
        with suppress(RuntimeError):  # from a store whose process has exited
            told = f"{type(error).__name__}: {error}", _is_stop(error), _is_of_others(error)
            _put(_store(), f"left/{rank()}", told)


@contextmanager
def knowing_others(exits: Mapping[int, Exit]) -> Iterator[None]:
    """Explains an error of a collective within the block by the error of the process that stopped
    first, of which torch knows only that its connection was closed.

    Args:
        exits: the processes of which this one knows that they have exited, by rank; more may come
            within the block. None of them is waited for.

    Raises:
        NotGatheredError: in place of the error.
    """
    global _exits
    _exits = exits
    try:
        yield
    except RuntimeError as error:
        if n_processes() == 1 or not _is_of_collective(error):
            raise
        until = time.monotonic() + TOLD_WITHIN_S
        while (reason := reason_of_others()) is None and time.monotonic() < until:
            time.sleep(_LONGEST_PAUSE_S)
        if reason is None:
            reported = first_line(error)
            reason = NotGatheredError(
                f"{TOGETHER}; torch reports: {reported}. The output of the others may say why"
            )
        raise reason from error
    finally:
        _exits = {}


def reason_of_others() -> NotGatheredError | None:
    """Why another process has stopped; None if none is known to have.

    If several have, most of them only because of another one; its reason counts.
    """
    left: dict[int, _Left] = {}
    with suppress(RuntimeError):  # from a store whose process has exited
        for other in range(n_processes()):
            if other != rank() and (told := _left(_store(), other)):
                left[other] = told
    first = next((other for other, told in left.items() if not told.is_of_others), None)
    if first is not None:
        return left[first].error(first)
    exited = next((other for other in _exits if other not in left), None)
    if exited is not None:
        return _has_exited(exited)
    return next((told.error(other) for other, told in left.items()), None)


class _Left(NamedTuple):
    """What a process that has left says about it.

    Attributes:
        why: the type and the message of its error.
        is_stop: whether it was asked to stop.
        is_of_others: whether it left because another process had.
    """

    why: str
    is_stop: bool
    is_of_others: bool

    def error(self, other: int) -> NotGatheredError:
        kind = StoppedError if self.is_stop else NotGatheredError
        return kind(f"{TOGETHER}; process {other} has stopped: {self.why}")


def _left(store: dist.Store, other: int) -> _Left | None:
    key = f"left/{other}"
    return _Left(*pickle.loads(store.get(key))) if store.check([key]) else None


def _has_exited(other: int) -> NotGatheredError:
    kind = StoppedError if _exits[other].is_stop else NotGatheredError
    return kind(f"{TOGETHER}; process {other} {_exits[other].how}")


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, StoppedError) or not isinstance(error, Exception)


def _is_of_others(error: BaseException) -> bool:
    return isinstance(error, NotGatheredError) or _is_of_collective(error)


def _is_of_collective(error: BaseException) -> bool:
    is_of_gloo = isinstance(error, RuntimeError) and _GLOO in str(error)
    return is_of_gloo or isinstance(error, dist.DistError)


@contextmanager
def _reached() -> Iterator[None]:
    """Explains the error if the store, which the first process hosts, cannot be reached."""
    try:
        yield
    except RuntimeError as error:  # errors of torch.distributed are of this type
        raise NotGatheredError(
            f"{TOGETHER}; the first process cannot be "
            f"reached or has ended without an error message: {first_line(error)}"
        ) from error


def _taken(store: dist.Store, keys: Mapping[int, str]) -> list[Any]:
    """The values of the keys, one per process, once all have arrived.

    The wait consists of short ones: during a wait, torch lets no signal through, and it would wait
    in full for a process that has exited.
    """
    began, within_s = time.monotonic(), _timeout_of(store).total_seconds()
    while not store.check([*keys.values()]):
        waited_s = time.monotonic() - began
        is_believed = waited_s >= min(BELIEVED_AFTER_S, within_s)
        if _exits or is_believed:
            _require_there(store, keys, is_believed=is_believed, is_over=waited_s >= within_s)
        time.sleep(min(max(_PAUSE * waited_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
    return [pickle.loads(store.get(key)) for key in keys.values()]


def _take(store: dist.Store, keys: Mapping[int, str]) -> list[Any]:
    """The same as `_taken`, and removes the values."""
    values = _taken(store, keys)
    for key in keys.values():
        store.delete_key(key)
    return values


def _require_there(
    store: dist.Store, keys: Mapping[int, str], *, is_believed: bool, is_over: bool
) -> None:
    """Raises `NotGatheredError` if a process that is waited for has exited; with `is_believed`,
    also if it has left; with `is_over`, also if it has not arrived."""
    exited = {*_exits}  # before the keys: one that exits now may have put its value
    missing = [other for other, key in keys.items() if not store.check([key])]
    for other in missing:
        if other in exited or (is_believed and _left(store, other)):
            raise reason_of_others() or _has_exited(other)
    if is_over and missing:
        raise NotGatheredError(
            f"{TOGETHER}; {', '.join(map(str, missing))} "
            f"did not come within {_timeout_of(store)}. See their logs; if they are only slow, "
            "increase the timeout of the process group."
        )


def _put(store: dist.Store, key: str, value: Any) -> None:
    store.set(key, pickle.dumps(value))  # type: ignore[arg-type] # bytes as well as texts


def _store() -> dist.Store:
    """The store through which the processes met: it reaches all of them, whatever device they
    use."""
    return dist.PrefixStore("nerve", distributed_c10d._get_default_store())


def _timeout_of(store: dist.Store) -> timedelta:
    """The timeout given to `init_process_group`, or torch's default of half an hour."""
    timeout: timedelta = store.timeout  # type: ignore[attr-defined] # missing in torch's stub
    return timeout


def own_part(parts: Sequence[Any]) -> Any:
    """This process's part of values that all processes once gathered.

    Raises:
        StoreError: if the number of processes was different.
    """
    if len(parts) != n_processes():
        raise StoreError(
            "A run must be resumed with its original number of processes; its checkpoint is of "
            f"{len(parts)} processes, now there are {n_processes()}. Start it with {len(parts)}: "
            "set CUDA_VISIBLE_DEVICES or the number of tasks of the job."
        )
    return parts[rank()]
