"""One run directory: its record, whether a process is running it, and the paths of its files."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nerve.config import require_choice
from nerve.errors import StoreError
from nerve.storage.identity import differences
from nerve.storage.record import RunRecord
from nerve.storage.record_file import RECORD_NAME, NoRecordError, lost_record
from nerve.storage.state import FRESH, LOCK_NAME, RunIsBusyError, RunLock, RunState, is_locked

if TYPE_CHECKING:
    from nerve.storage.store import RunStore

Which = Literal["best", "last"]
CHECKPOINTS = "checkpoints"
SHOWN = 5
"""How many differing keys an error lists; the rest are only counted."""


class RunDirectory:
    """The directory of one run, whether or not it exists.

    The lock and `run.json` are read when they are first needed, and again after `reload` and within
    `locked`; changes made through this object are known without reading.

    Args:
        path: path of the directory.
    """

    ANOTHER = "another directory"
    """What a user can choose; a subclass says how. For messages."""

    RETRY = "retry=True"
    """How a user asks for a failed run to be restarted. For messages."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: RunLock | None = None
        self._found: tuple[bool | None, RunRecord | None] | None = None

    @property
    def record(self) -> RunRecord | None:
        """The contents of `run.json`; None if there is no run.

        Raises:
            StoreError: like `RunRecord.load`, for a record that is damaged, missing although the
                run has stored data, or written by a newer nerve.
        """
        return self._look()[1]

    def require_record(self) -> RunRecord:
        """Like `record`, but also raises `StoreError` if there is none."""
        return self.record or RunRecord.load(self.path)  # raises an error that says what is missing

    @property
    def state(self) -> RunState:
        """The state of the run; a directory that does not exist is `new`.

        The lock decides between alive and dead. But on some file systems locks do not reach across
        hosts or do not exist, and user code may not take the lock. If the lock therefore says
        nothing about a run, it also counts as alive while its heartbeat is less than a minute old.

        Raises:
            StoreError: like `record`.
        """
        locked, record = self._look()
        if record is None:
            return RunState.ALIVE if locked else RunState.NEW
        if record.run_status == "done":
            return RunState.DONE
        if locked or (_lock_is_inconclusive(record, locked) and abs(_age(record)) < FRESH):
            return RunState.ALIVE
        return RunState.DEAD if record.run_status == "running" else RunState(record.run_status)

    @property
    def n_starts(self) -> int:
        """How many times a process has started the run. Raises like `record`."""
        return self.record.restarts + 1 if self.record else 0

    def reload(self) -> "RunDirectory":
        """Forgets what was read, so that it is read again when it is next needed; returns self."""
        self._found = None
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Prevents other processes from running it within the block.

        Raises:
            RunIsBusyError: if another process is running it.
            StoreError: if the directory cannot be written.
        """
        self.reload()
        lock = self._lock = RunLock(self.path)
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def is_done(self, config: Mapping[str, Any]) -> bool:
        """Whether a run of this configuration is done here. Raises like `require_same`."""
        if self.state != RunState.DONE:
            return False
        self.require_same(config)
        return True

    def create_or_resume(
        self,
        config: Mapping[str, Any],
        *,
        retry: bool = False,
        job: dict[str, Any] | None = None,
        **first: Any,
    ) -> RunRecord:
        """Creates the record of a new run, or updates the record of a run to be resumed.

        The record of a completed run is returned unchanged. Must be called within `locked`. If the
        lock says nothing about other processes (after a node failed, or without locks) and the
        heartbeat is recent, or ahead of this host's clock, it takes up to a minute to make sure
        that no other process is running it.

        Args:
            config: the full resolved configuration.
            retry: whether to restart a failed run.
            job: the cluster's names for the run.
            first: other fields of a new run's record.

        Raises:
            RunIsBusyError: if another process is running it although the lock is free.
            StoreError: if the directory holds a run of another configuration, or a failed one and
                `retry` is not set.
        """
        if self.record is None:
            return self.create(config, job=job, **first)
        record = self._wait_until_surely_idle(self.record)
        self.require_same(config)
        if record.run_status == "failed" and not retry:
            error = ": ".join(filter(None, (record.error or {}).values()))
            raise StoreError(
                f"A failed run is only restarted with {self.RETRY}; {self.path} holds run "
                f"{record.run_id}, which failed with {error or 'an error'}. Fix the cause and add "
                f"{self.RETRY}, or choose {self.ANOTHER}."
            )
        if record.run_status != "done":
            record.restart(config=dict(config), job=job)
        return record

    def create(self, config: Mapping[str, Any], **values: Any) -> RunRecord:
        """Creates the record of a new run. Arguments and errors as in `RunRecord.create`."""
        record = RunRecord.create(self.path, config, **values)
        self._found = (False, record)
        return record

    def interrupt(self, error: BaseException) -> None:
        """Records an interruption that the run has not recorded itself, because it came in the
        middle of that or of its start; nothing if another process may be running it. Must be called
        within `locked`. Raises `StoreError` if the record cannot be read or written."""
        record = self.reload().record
        is_ours = self._lock is not None and self._lock.is_held
        if is_ours and record is not None and record.run_status == "running":
            record.finish("interrupted", error=error)

    def require_same(self, config: Mapping[str, Any]) -> None:
        """Raises `StoreError` if the directory holds a run of another configuration."""
        record = self.record
        different = differences(record.config, config) if record is not None else []
        if record is not None and different:
            shown = [
                f"{key} ({_at(record.config, key)}, now {_at(config, key)})" for key in different
            ]
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            raise StoreError(
                f"A directory can hold only one run; {self.path} holds run {record.run_id} "
                f"({record.run_status}) with other values of {', '.join(shown[:SHOWN])}{more}. "
                f"Choose {self.ANOTHER}, or delete that one."
            )

    def store(self) -> "RunStore":
        """The store of its rows. Raises `StoreError` if there is no record, and like `RunStore`."""
        from nerve.storage.store import RunStore  # imports pyarrow, which a sweep does not need

        return RunStore(self.path, self.require_record().run_id)

    def checkpoint(self, which: Which) -> Path:
        """Path of its last checkpoint, or of its weights with the lowest validation loss."""
        require_choice("a checkpoint", which, ("best", "last"))
        return self.path / CHECKPOINTS / f"{which}.ckpt"

    def kept_checkpoint(self, step: int) -> Path:
        """Path of its weights at `step`; padded, so that names sort like steps."""
        return self.path / CHECKPOINTS / f"step-{step:012d}.ckpt"

    def kept_steps(self) -> list[int]:
        """The steps whose weights it has kept, in order."""
        names = (path.name for path in (self.path / CHECKPOINTS).glob("step-*.ckpt"))
        matches = (re.fullmatch(r"step-(\d{12})\.ckpt", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def _look(self) -> tuple[bool | None, RunRecord | None]:
        """Whether another process has the lock (None if unknown), and the record."""
        if self._found is None:
            # The lock first, so that a run that ends in between shows as ended.
            if self._lock is None:
                locked = is_locked(self.path)
            else:
                locked = False if self._lock.is_held else None
            self._found = locked, self._load()
        return self._found

    def _load(self) -> RunRecord | None:
        try:
            return RunRecord.load(self.path)
        except NoRecordError:
            last = self.checkpoint("last")
            if last.is_file():  # a new run here would resume from it
                raise lost_record(last, self.path / RECORD_NAME) from None
            return None

    def _wait_until_surely_idle(self, record: RunRecord) -> RunRecord:
        """The record, once it is certain that no other process writes it.

        That is the case once its heartbeat is old, or has not changed for a minute of this host's
        clock, which may differ from that of the host that wrote it.
        """
        first, until = record.heartbeat, time.monotonic() + FRESH.total_seconds()
        while _lock_is_inconclusive(record, self._look()[0]) and _age(record) < FRESH:
            if record.heartbeat != first:
                raise RunIsBusyError(
                    f"Only one process may run in a directory; {self.path} is in use on host "
                    f"{record.host}, which still updates its heartbeat. Wait until that process "
                    "finishes, or stop it."
                )
            if time.monotonic() > until:
                break
            time.sleep(1.0)
            record = self.reload().record or record
        return record


def _lock_is_inconclusive(record: RunRecord, locked: bool | None) -> bool:
    """Whether a lock on this host says nothing about a running run."""
    if record.run_status != "running":
        return False
    is_of_here = record.host == socket.gethostname() and (record.directory / LOCK_NAME).exists()
    return locked is None or not is_of_here


def _age(record: RunRecord) -> timedelta:
    """Time since the heartbeat by this host's clock; negative if the other host's is ahead."""
    return datetime.now(UTC) - datetime.fromisoformat(record.heartbeat)


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return "not there"
        config = config[name]
    return config
