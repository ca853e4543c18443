"""Solves the eigenproblems of measurements during training, and returns their rows in order."""

import logging
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nerve.errors import MeasurementError
from nerve.measuring.eigenproblem import FFNSpectra, GroupSpectrum
from nerve.measuring.messages import Mailbox, gathered, in_turns
from nerve.measuring.processes import n_processes, rank
from nerve.recording.dispatch import Dispatch, Eigenproblem, Waiting

log = logging.getLogger(__name__)

MOST_PENDING = 4
"""Number of measurements that may be pending; with one more, training waits for the oldest."""

SHARE_OF_DEVICE = 8
"""All but the newest may take 1/`SHARE_OF_DEVICE` of the device's memory."""

Labels = dict[str, Any]


@dataclass(frozen=True)
class Solved:
    """A measurement's labels (its step, losses, …), the spectra of its FFNs, and those of groups
    and sites where they were measured."""

    labels: Labels
    spectra: list[FFNSpectra]
    groups: Sequence[GroupSpectrum] = ()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows of the `metrics` table."""
        return [self.labels | spectra.row() for spectra in self.spectra]

    @property
    def group_rows(self) -> list[dict[str, Any]]:
        """The rows of the `groups` table, including pre and post of all samples if there are
        others."""
        if not self.groups:
            return []
        step = {"step": self.labels["step"]}
        pooled = [each for spectra in self.spectra for each in spectra.pooled]
        return [step | each.row() for each in (*pooled, *self.groups)]


class _Pending(NamedTuple):
    """A measurement and the futures of its spectra."""

    labels: Labels
    waiting: list[Waiting]

    @property
    def is_done(self) -> bool:
        return all(each.future.done() for each in self.waiting)

    @property
    def n_bytes(self) -> int:
        """The device memory it occupies."""
        return sum(each.n_bytes for each in self.waiting)


class _Part(NamedTuple):
    """What one process solved of a measurement; `error` says what could not be solved."""

    labels: Labels
    spectra: list[FFNSpectra]
    groups: list[GroupSpectrum]
    error: MeasurementError | None


class Solver:
    """Takes the eigenproblems of measurements and returns their solutions, in order.

    Those of a GPU are solved while training goes on, those of a CPU at once (`Dispatch`).

    With several processes, each submits its share of a measurement's eigenproblems: process r of n
    takes every n-th, starting with number r. Process 0 gets all spectra, the others get their own.
    They exchange errors whenever they call `submit`, but wait for each other's spectra only in
    `drain`. All processes must call `submit` and `drain` alike.

    Args:
        device: where the model trains.
        n_workers: number of host threads; 0 solves on `device`.
        n_bytes: expected host memory of an eigenproblem, which is allocated now, while training
            starts.
    """

    def __init__(self, device: torch.device, n_workers: int = 0, n_bytes: int = 0) -> None:
        self._dispatch = Dispatch(device, n_workers, n_bytes)
        self._pending: deque[_Pending] = deque()
        self._parts: deque[_Part] = deque()
        self._mail = Mailbox() if n_processes() > 1 else None
        self._failed: MeasurementError | None = None
        self._most_bytes = _most_bytes(device)
        self._has_warned = False

    @property
    def n_workers(self) -> int:
        """Number of host threads that solve."""
        return self._dispatch.n_workers

    def submit(self, labels: Labels, eigenproblems: Sequence[Eigenproblem]) -> Iterator[Solved]:
        """Accepts a measurement at once; yields what has been solved by then, after waiting if too
        much is pending.

        Raises:
            MeasurementError: for one that could not be solved, with its layer and step; in all
                processes.
        """
        is_beside = self._dispatch.is_beside
        if is_beside:
            self._collect_done()
            self._raise_failed()
        waiting = self._dispatch.start(eigenproblems, labels.get("step"))
        self._pending.append(_Pending(labels, waiting))
        if not is_beside:
            return self.drain()
        self._wait_for_room()
        return self.finished()

    def finished(self) -> Iterator[Solved]:
        """Yields the measurements that are solved, without waiting. Raises as `submit` does, but
        only with a single process; several processes must raise together."""
        self._collect_done()
        while self._parts:
            solved = self._solved(wait=False)
            if solved is None:
                break
            yield solved
        if self._mail is None:
            self._raise_failed()

    def drain(self) -> Iterator[Solved]:
        """Waits for all measurements, and yields them. Raises as `submit` does."""
        while self._pending:
            self._collect()
        while self._parts:
            solved = self._solved(wait=True)
            if solved is not None:
                yield solved
        self._raise_failed()

    def close(self) -> None:
        """Ends the threads; pending work is dropped."""
        self._pending.clear()
        self._parts.clear()
        self._dispatch.close()

    def _wait_for_room(self) -> None:
        """Waits for the oldest measurements if too much is pending; no process waits for
        another."""
        while len(self._pending) > MOST_PENDING or self._older_bytes() > self._most_bytes:
            if not self._has_warned:
                self._has_warned = True
                log.warning(
                    "training waits for the spectra of step %s: %s unsolved measurements "
                    "occupy %.3g GiB. Measure less often, measure fewer layers, or use "
                    "more cores",
                    self._pending[0].labels.get("step"),
                    len(self._pending),
                    self._older_bytes() / 2**30,
                )
            self._collect()

    def _older_bytes(self) -> int:
        """The device memory of all pending measurements but the newest."""
        return sum(each.n_bytes for each in list(self._pending)[:-1])

    def _collect_done(self) -> None:
        while self._pending and self._pending[0].is_done:
            self._collect()

    def _collect(self) -> None:
        """Waits for the spectra of the oldest measurement and collects them."""
        labels, waiting = self._pending[0]
        spectra: list[FFNSpectra] = []
        groups: list[GroupSpectrum] = []
        error: MeasurementError | None = None
        for each in waiting:
            cause = each.future.exception()  # also of what would end this thread
            if cause is None:
                result = each.future.result()
                (spectra if isinstance(result, FFNSpectra) else groups).append(result)
            else:
                error = MeasurementError(
                    f"The spectra of {each.name} at step {labels.get('step')} could not be "
                    f"solved: {str(cause) or type(cause).__name__}"
                )
                error.__cause__ = cause
        self._pending.popleft()  # not earlier: Ctrl-C may end the wait, and it is still pending
        self._failed = self._failed or error
        part = _Part(labels, spectra, groups, error)
        if self._mail is not None and rank() > 0:
            self._mail.send((spectra, groups, None if error is None else str(error)))
        self._parts.append(part)

    def _solved(self, *, wait: bool) -> Solved | None:
        """The next measurement; None if part of it is missing or could not be solved."""
        labels, spectra, groups, error = self._parts[0]
        if self._mail is not None and rank() == 0:
            others = self._mail.take(wait=wait)
            if others is None:
                return None
            spectra = in_turns([spectra, *(each[0] for each in others)])
            groups = in_turns([groups, *(each[1] for each in others)])
            message = next((each[2] for each in others if each[2] is not None), None)
            if error is None and message is not None:
                error = MeasurementError(message)
                self._failed = self._failed or error
        self._parts.popleft()
        return Solved(labels, spectra, groups) if error is None else None

    def _raise_failed(self) -> None:
        """Raises for what could not be solved, in all processes, which must all call it."""
        failed, self._failed = self._failed, None
        if self._mail is not None:
            messages = gathered(None if failed is None else str(failed))
            other = next((text for text in messages if text is not None), None)
            failed = MeasurementError(other) if failed is None and other is not None else failed
        if failed is not None:
            raise failed


def _most_bytes(device: torch.device) -> int:
    """The GPU memory that pending measurements may occupy."""
    if device.type != "cuda":
        return sys.maxsize
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_DEVICE
