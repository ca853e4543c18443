"""Solves the eigenproblems of measurements beside training, and gives their rows in order."""

import logging
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

from nerve.errors import MeasurementError
from nerve.measuring.distributed import Mailbox, gathered, in_turns, n_processes, rank
from nerve.measuring.eigenproblem import FFNSpectra, GroupSpectrum, pooled_spectra
from nerve.recording.place import Eigenproblem, Place, Placement, bytes_of, work_of
from nerve.recording.staging import Staging
from nerve.recording.workers import pool_of

log = logging.getLogger(__name__)

MOST_PENDING = 4
"""Measurements that may wait for their solution; one more has training wait for the oldest."""

SHARE_OF_DEVICE = 8
"""All but the newest of them may take one part in so many of the device's memory."""

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
        """Those of the `metrics` table."""
        return [self.labels | spectra.row() for spectra in self.spectra]

    @property
    def group_rows(self) -> list[dict[str, Any]]:
        """Those of the `groups` table: with pre and post of all samples, where there are others."""
        if not self.groups:
            return []
        step = {"step": self.labels["step"]}
        pooled = [each for spectra in self.spectra for each in pooled_spectra(spectra)]
        return [step | each.row() for each in (*pooled, *self.groups)]


class _Waiting(NamedTuple):
    """An FFN as messages name it, its eigenproblem until a thread takes it, and its spectra to
    come."""

    name: str
    untaken: list[Eigenproblem]
    future: Future[Any]


class _Pending(NamedTuple):
    """A measurement and its spectra to come."""

    labels: Labels
    waiting: list[_Waiting]

    @property
    def is_done(self) -> bool:
        return all(each.future.done() for each in self.waiting)

    @property
    def n_bytes(self) -> int:
        """What it takes of the device."""
        return sum(bytes_of(problem) for each in self.waiting for problem in tuple(each.untaken))


class _Part(NamedTuple):
    """What one process solved of a measurement; `error` says what it could not solve."""

    labels: Labels
    spectra: list[FFNSpectra]
    groups: list[GroupSpectrum]
    error: MeasurementError | None


class Solver:
    """Takes a measurement's eigenproblems and gives their solutions, in the order of measurements.

    Those of a GPU are solved while training goes on, each where it costs less (`Placement`): copied
    to the host and solved there, one thread for each of them, or on the GPU, between its other
    work. On the CPU, whose cores train, they are solved at once.

    Of several processes each submits its share of a measurement's eigenproblems: process r of n
    every n-th, from number r on. Process 0 gets the spectra of all, the others their own. Only in
    `drain` do they wait for each other. `submit` and `drain` every process must call alike.

    Args:
        device: where the model trains.
        n_workers: threads of the host; 0 solves on `device`.
        n_bytes: what an eigenproblem is expected to take on the host: room for it is made now,
            beside what comes first.
    """

    def __init__(self, device: torch.device, n_workers: int = 0, n_bytes: int = 0) -> None:
        self.n_workers = n_workers
        self._device = device
        self._pending: deque[_Pending] = deque()
        self._parts: deque[_Part] = deque()
        self._mail = Mailbox() if n_processes() > 1 else None
        self._failed: MeasurementError | None = None
        self._most_bytes = _most_bytes(device)
        self._has_warned = False
        self._pool = pool_of(self.n_workers) if self.n_workers else None
        is_gpu = device.type == "cuda"
        self._of_gpu = ThreadPoolExecutor(1, thread_name_prefix="spectra-gpu") if is_gpu else None
        self._stream = torch.cuda.Stream(device) if is_gpu else None
        self._staging = Staging(device)
        self._placement = Placement(n_workers)
        self._said: Counter[Place] = Counter()
        if self._pool and is_gpu:
            self._pool.submit(self._staging.reserve, n_bytes)

    def submit(self, labels: Labels, eigenproblems: Sequence[Eigenproblem]) -> Iterator[Solved]:
        """Takes a measurement at once; gives what is solved by then, after waiting if too much is
        pending.

        Raises:
            MeasurementError: for one that could not be solved, with its layer and step; in all
                processes.
        """
        is_beside = bool(self._pool or self._of_gpu)
        if is_beside:
            self._collect_done()
            self._raise_failed()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._device).record_event()
        works = [work_of(each) for each in eigenproblems]
        if self._of_gpu:
            places = self._placement.choose(works)
        else:
            places = ["host" if self._pool else "device"] * len(works)
        self._say(places, labels.get("step"))
        waiting = []
        for eigenproblem, work, place in zip(eigenproblems, works, places, strict=True):
            name = f"{eigenproblem.ffn} in layer {eigenproblem.layer}"
            # What solves it takes it from the list, so that a GPU's memory is free once copied.
            untaken = [eigenproblem]
            task = partial(self._solve, untaken, place, work, ready)
            waiting.append(_Waiting(name, untaken, self._start(task, place)))
        self._pending.append(_Pending(labels, waiting))
        if not is_beside:
            return self.drain()
        self._wait_for_room()
        return self.finished()

    def finished(self) -> Iterator[Solved]:
        """Gives the measurements that are solved, without waiting. Raises as `submit`, but of
        several processes only that does, as all must."""
        self._collect_done()
        while self._parts:
            solved = self._solved(wait=False)
            if solved is None:
                break
            yield solved
        if self._mail is None:
            self._raise_failed()

    def drain(self) -> Iterator[Solved]:
        """Waits for all measurements, and gives them. Raises as `submit`."""
        while self._pending:
            self._collect()
        while self._parts:
            solved = self._solved(wait=True)
            if solved is not None:
                yield solved
        self._raise_failed()

    def close(self) -> None:
        """Ends the threads; what is still pending is dropped."""
        self._pending.clear()
        self._parts.clear()
        for pool in (self._pool, self._of_gpu):
            if pool:
                pool.shutdown(cancel_futures=True)

    def _start(self, task: Callable[[], Any], place: Place) -> Future[Any]:
        pool = self._pool if place == "host" else self._of_gpu
        if pool:
            return pool.submit(task)
        future: Future[Any] = Future()
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
        return future

    def _solve(
        self,
        untaken: list[Eigenproblem],
        place: Place,
        work: float,
        ready: torch.cuda.Event | None,
    ) -> FFNSpectra | GroupSpectrum:
        began, seconds = time.monotonic(), None
        try:
            if place == "host" and self._stream is not None:
                spectra = self._staging.to_host(untaken.pop(), ready).solve()
            else:
                with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                    if self._stream is not None and ready is not None:
                        self._stream.wait_event(ready)
                    spectra = untaken.pop().solve()
            seconds = time.monotonic() - began
        finally:
            self._placement.solved(place, work, seconds)
        return spectra

    def _say(self, places: Sequence[Place], step: Any) -> None:
        """Logs where the eigenproblems go, when that changes."""
        counted = Counter(places)
        if counted != self._said:
            self._said = counted
            log.info(
                "of the %s spectra of step %s, %s are solved by %s threads of the host beside "
                "training, %s on %s",
                len(places),
                step,
                counted["host"],
                self.n_workers,
                counted["device"],
                self._device,
            )

    def _wait_for_room(self) -> None:
        """Waits for the oldest measurements where too much waits for its solution; no process waits
        for another."""
        while len(self._pending) > MOST_PENDING or self._older_bytes() > self._most_bytes:
            if not self._has_warned:
                self._has_warned = True
                log.warning(
                    "training waits for the spectra of step %s: of %s measurements not all are "
                    "solved, and they take %.3g GiB. Measure less often, fewer layers, or with "
                    "more cores",
                    self._pending[0].labels.get("step"),
                    len(self._pending),
                    self._older_bytes() / 2**30,
                )
            self._collect()

    def _older_bytes(self) -> int:
        """What all measurements but the newest take of the device."""
        return sum(each.n_bytes for each in list(self._pending)[:-1])

    def _collect_done(self) -> None:
        while self._pending and self._pending[0].is_done:
            self._collect()

    def _collect(self) -> None:
        """Takes the spectra of the oldest measurement, which are waited for."""
        labels, waiting = self._pending.popleft()
        spectra: list[FFNSpectra] = []
        groups: list[GroupSpectrum] = []
        error: MeasurementError | None = None
        for each in waiting:
            try:
                result = each.future.result()
                (spectra if isinstance(result, FFNSpectra) else groups).append(result)
            except Exception as cause:
                error = MeasurementError(
                    f"The spectra of {each.name} at step {labels.get('step')} could not be "
                    f"solved: {cause}"
                )
                error.__cause__ = cause
        self._failed = self._failed or error
        part = _Part(labels, spectra, groups, error)
        if self._mail is not None and rank() > 0:
            self._mail.send((spectra, groups, None if error is None else str(error)))
        self._parts.append(part)

    def _solved(self, *, wait: bool) -> Solved | None:
        """The next measurement; None where some of it has not come, or could not be solved."""
        labels, spectra, groups, error = self._parts[0]
        if self._mail is not None and rank() == 0:
            others = self._mail.take(wait=wait)
            if others is None:
                return None
            spectra = in_turns([spectra, *(each[0] for each in others)])
            groups = in_turns([groups, *(each[1] for each in others)])
            told = next((each[2] for each in others if each[2] is not None), None)
            if error is None and told is not None:
                error = MeasurementError(told)
                self._failed = self._failed or error
        self._parts.popleft()
        return Solved(labels, spectra, groups) if error is None else None

    def _raise_failed(self) -> None:
        """Raises what could not be solved, in all processes, which must call it alike."""
        failed, self._failed = self._failed, None
        if self._mail is not None:
            told = gathered(None if failed is None else str(failed))
            other = next((text for text in told if text is not None), None)
            failed = MeasurementError(other) if failed is None and other is not None else failed
        if failed is not None:
            raise failed


def _most_bytes(device: torch.device) -> int:
    """What measurements may take of a GPU while they wait."""
    if device.type != "cuda":
        return sys.maxsize
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_DEVICE
