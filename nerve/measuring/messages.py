"""Objects that the processes of a run send each other, without a device."""

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from nerve.errors import NotGatheredError, StoreError, first_line
from nerve.measuring.departures import TOGETHER, exited, has_left, reason_of_others, stay
from nerve.measuring.processes import n_processes, put, rank, shared_store, value_of

BELIEVED_AFTER_S = 30.0
"""How long to keep waiting for a process that has left: it may return if its error was caught."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2e-4, 0.05
_PAUSE = 1 / 16
"""Polling interval as a fraction of the time waited so far, so that a result is noticed with at
most this relative delay."""


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
        store = shared_store()
        number = store.add(f"gathered/{mine}", 1)
        stay()
        put(store, f"gathered/{number}/{mine}", value)
        values = _taken(store, {other: f"gathered/{number}/{other}" for other in range(n)})
        # All have arrived here, so they have read the previous values.
        store.delete_key(f"gathered/{number - 1}/{mine}")
        if mine == 0:
            _take(store, {other: f"read/{number}/{other}" for other in range(1, n)})
        else:
            put(store, f"read/{number}/{mine}", None)
    return values


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


class Mailbox:
    """Sends objects to process 0, which takes them when they have arrived: no process waits.

    Every process must create its mailboxes in the same order.
    """

    def __init__(self) -> None:
        self._store = shared_store()
        number = self._store.add(f"mailboxes/{rank()}", 1)
        self._name = f"mailbox/{number}"
        self._n = 0

    def send(self, value: Any) -> None:
        """For other processes: sends the next object to process 0."""
        with _reached():
            put(self._store, self._key(rank()), value)
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
        if exited() or is_believed:
            _require_there(store, keys, is_believed=is_believed, is_over=waited_s >= within_s)
        time.sleep(min(max(_PAUSE * waited_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S))
    return [value_of(store, key) for key in keys.values()]


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
    gone = exited()  # before the keys: one that exits now may have put its value
    missing = [other for other, key in keys.items() if not store.check([key])]
    if any(other in gone or (is_believed and has_left(other)) for other in missing):
        reason = reason_of_others()
        if reason is not None:  # else it has just returned
            raise reason
    if is_over and missing:
        raise NotGatheredError(
            f"{TOGETHER}; {', '.join(map(str, missing))} "
            f"did not come within {_timeout_of(store)}. See their logs; if they are only slow, "
            "increase the timeout of the process group."
        )


def _timeout_of(store: dist.Store) -> timedelta:
    """The timeout given to `init_process_group`, or torch's default of half an hour."""
    timeout: timedelta = store.timeout  # type: ignore[attr-defined] # missing in torch's stub
    return timeout
