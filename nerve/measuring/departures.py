"""Which processes of a run have left, and why."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch.distributed as dist

from nerve.errors import NotGatheredError, StoppedError, first_line
from nerve.measuring.processes import n_processes, put, rank, shared_store, value_of

TOGETHER = "The processes of a run must all continue together"

REASON_WITHIN_S = 1.0
"""How long to wait for the reason of a process that has closed its connection."""

_POLL_S = 0.05

_GLOO = "/gloo/"
"""A part of the messages of gloo, whose errors have no type of their own."""


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
        until = time.monotonic() + REASON_WITHIN_S
        while (reason := reason_of_others()) is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        if reason is None:
            reported = first_line(error)
            reason = NotGatheredError(
                f"{TOGETHER}; torch reports: {reported}. The output of the others may say why"
            )
        raise reason from error
    finally:
        _exits = {}


def leave(error: BaseException) -> None:
    """Tells the other processes, which may wait for this one, that it stops with an error."""
    if n_processes() > 1:
        with suppress(RuntimeError):  # from a store whose process has exited
            departure = f"{type(error).__name__}: {error}", _is_stop(error), _is_of_others(error)
            put(shared_store(), _key(rank()), departure)


def stay() -> None:
    """Revokes `leave`, because the error was caught."""
    shared_store().delete_key(_key(rank()))


def exited() -> set[int]:
    """The processes that are known to have exited."""
    return {*_exits}


def has_left(other: int) -> bool:
    """Whether a process has told the others that it stops; it may return."""
    return shared_store().check([_key(other)])


def reason_of_others() -> NotGatheredError | None:
    """Why another process has stopped; None if none is known to have.

    If several have, most of them only because of another one; its reason counts.
    """
    departures: dict[int, _Departure] = {}
    with suppress(RuntimeError):  # from a store whose process has exited
        for other in range(n_processes()):
            if other != rank() and has_left(other):
                departures[other] = _Departure(*value_of(shared_store(), _key(other)))
    first = next((other for other, each in departures.items() if not each.is_of_others), None)
    if first is not None:
        return departures[first].error(first)
    silent = next((other for other in _exits if other not in departures), None)
    if silent is not None:
        return _has_exited(silent)
    return next((each.error(other) for other, each in departures.items()), None)


class _Departure(NamedTuple):
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


def _key(process: int) -> str:
    return f"left/{process}"


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
