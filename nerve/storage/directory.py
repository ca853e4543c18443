"""One run directory: its record, who is at work in it, and where its files are."""

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
from nerve.storage.record import RECORD_NAME, NoRecordError, RunRecord, lost_record
from nerve.storage.state import FRESH, LOCK_NAME, RunIsBusyError, RunLock, RunState, is_locked

if TYPE_CHECKING:
    from nerve.storage.store import RunStore

Which = Literal["best", "last"]
CHECKPOINTS = "checkpoints"
SHOWN = 5
"""Differing keys that an error names; more are counted."""


class RunDirectory:
    """The directory of one run, there or not.

    Lock and `run.json` are looked at when they are first asked for, and again after `reload` and
    within `locked`; what this object writes it knows.

    Args:
        path: of the directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock: RunLock | None = None
        self._found: tuple[bool | None, RunRecord | None] | None = None

    @property
    def record(self) -> RunRecord | None:
        """What `run.json` says; None where there is no run.

        Raises:
            StoreError: as `RunRecord.load`, for a record that is damaged, gone from beside what its
                run has stored, or of a newer nerve.
        """
        return self._look()[1]

    def require_record(self) -> RunRecord:
        """As `record`, but `StoreError` is also raised where there is none."""
        return self.record or RunRecord.load(self.path)  # which says what is missing

    @property
    def state(self) -> RunState:
        """Where the run stands; a directory that is not there is `new`.

        The lock decides between alive and dead. A lock may not reach across hosts on every file
        system, not every file system has locks, and code of one's own may take none: a run of which
        no lock can tell is alive, too, while its heartbeat is less than a minute from now.

        Raises:
            StoreError: as `record`.
        """
        locked, record = self._look()
        if record is None:
            return RunState.ALIVE if locked else RunState.NEW
        if record.run_status == "done":
            return RunState.DONE
        if locked or (_is_untold(record, locked) and abs(_age(record)) < FRESH):
            return RunState.ALIVE
        return RunState.DEAD if record.run_status == "running" else RunState(record.run_status)

    @property
    def n_starts(self) -> int:
        """How often a process has begun to run it. Raises as `record`."""
        return self.record.restarts + 1 if self.record else 0

    def reload(self) -> "RunDirectory":
        """This directory, which is looked at anew when it is next asked."""
        self._found = None
        return self

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from running it within the block.

        Raises:
            RunIsBusyError: when another process is at work in it.
            StoreError: when the directory cannot be written.
        """
        self.reload()
        lock = self._lock = RunLock(self.path)
        try:
            yield
        finally:
            self._lock = None
            lock.release()

    def is_done(self, config: Mapping[str, Any]) -> bool:
        """Whether the run of this configuration is done here. Raises as `require_same`."""
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
        """The record of the run that starts here, at its beginning or where it was left.

        Of a run that is done it is as it was: nothing is to do. To be called within `locked`. That
        no other process runs it takes up to a minute to know where no lock tells and the heartbeat
        is fresh, or ahead of this host's clock: after a node was lost, or without locks.

        Args:
            config: the full resolved configuration.
            retry: whether a run that failed is to start again.
            job: the cluster's names for the run.
            first: other fields of a new run's record.

        Raises:
            RunIsBusyError: when another process, of which no lock tells, is at work here.
            StoreError: when the directory holds a run of another configuration, or one that failed
                and `retry` is not set.
        """
        if self.record is None:
            return self.create(config, job=job, **first)
        record = self._heard_out(self.record)
        self.require_same(config)
        if record.run_status == "failed" and not retry:
            error = ": ".join((record.error or {}).values())
            raise StoreError(
                f"A run that failed is not started again unasked; {self.path} holds run "
                f"{record.run_id}, which failed with {error or 'an error'}. Fix the cause and add "
                "retry=true, or choose another directory with hydra.run.dir=…."
            )
        if record.run_status != "done":
            record.restart(config=dict(config), job=job)
        return record

    def create(self, config: Mapping[str, Any], **values: Any) -> RunRecord:
        """The record of a new run. Arguments and errors as of `RunRecord.create`."""
        record = RunRecord.create(self.path, config, **values)
        self._found = (False, record)
        return record

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
                f"A directory holds one run; {self.path} holds run {record.run_id} "
                f"({record.run_status}) with other values of {', '.join(shown[:SHOWN])}{more}. "
                "Choose another directory with hydra.run.dir=… (of a sweep, hydra.sweep.dir=…), or "
                "delete that one."
            )

    def store(self) -> "RunStore":
        """Where its rows go. Raises `StoreError` where there is no record, and as `RunStore`."""
        from nerve.storage.store import RunStore  # pyarrow, which a sweep does not need

        return RunStore(self.path, self.require_record().run_id)

    def checkpoint(self, which: Which) -> Path:
        """Where it keeps its last checkpoint, or its weights of the lowest validation loss."""
        require_choice("a checkpoint", which, ("best", "last"))
        return self.path / CHECKPOINTS / f"{which}.ckpt"

    def kept_checkpoint(self, step: int) -> Path:
        """Where it keeps its weights of `step`; padded, so that names sort as steps do."""
        return self.path / CHECKPOINTS / f"step-{step:012d}.ckpt"

    def kept_steps(self) -> list[int]:
        """The steps of which it has kept its weights, in order."""
        names = (path.name for path in (self.path / CHECKPOINTS).glob("step-*.ckpt"))
        matches = (re.fullmatch(r"step-(\d{12})\.ckpt", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def _look(self) -> tuple[bool | None, RunRecord | None]:
        """Whether another process has the lock (None: nobody can tell), and the record."""
        if self._found is None:
            # The lock first: a run that ends in between then shows as ended.
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
            if last.is_file():  # a run that begins here would take it for its own
                raise lost_record(last, self.path / RECORD_NAME) from None
            return None

    def _heard_out(self, record: RunRecord) -> RunRecord:
        """The record once it is sure that no other process writes it.

        That is, once its heartbeat is old, or has not changed for a minute of this host's own: its
        clock may be another than that of the host which wrote the time.
        """
        first, until = record.heartbeat, time.monotonic() + FRESH.total_seconds()
        while _is_untold(record, self._look()[0]) and _age(record) < FRESH:
            if record.heartbeat != first:
                raise RunIsBusyError(
                    f"One process at a time runs in a directory; {self.path} is in use on host "
                    f"{record.host}, whose heartbeat goes on. Let that one finish or stop it."
                )
            if time.monotonic() > until:
                break
            time.sleep(1.0)
            record = self.reload().record or record
        return record


def _is_untold(record: RunRecord, locked: bool | None) -> bool:
    """Whether a lock on this host says nothing about a running run."""
    if record.run_status != "running":
        return False
    is_of_here = record.host == socket.gethostname() and (record.directory / LOCK_NAME).exists()
    return locked is None or not is_of_here


def _age(record: RunRecord) -> timedelta:
    """Since the heartbeat, by this host's clock; negative where the other's is ahead."""
    return datetime.now(UTC) - datetime.fromisoformat(record.heartbeat)


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return "not there"
        config = config[name]
    return config
