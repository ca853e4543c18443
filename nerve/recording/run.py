"""Starts, resumes and ends a run directory for callers other than the commands."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any, NamedTuple

from nerve.errors import ConfigError, StoppedError, StoreError, noted
from nerve.measuring.departures import leave
from nerve.measuring.messages import gathered
from nerve.measuring.processes import rank
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.state import RunState
from nerve.storage.store import RunStore

log = logging.getLogger(__name__)


class RecordedRun(NamedTuple):
    """A run that this process records: its `run.json`, and the store of its rows."""

    record: RunRecord
    store: RunStore


def seed_of(config: Mapping[str, Any]) -> int | None:
    """The `seed` of a caller's configuration, if it is an integer, also one of NumPy."""
    seed = config.get("seed")
    return int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else None


@contextmanager
def recorded_run(
    directory: str | os.PathLike[str], config: Mapping[str, Any], *, goes_on: bool, **first: Any
) -> Iterator[RecordedRun | None]:
    """Records a run within the block; yields None in processes that do not record: of several, all
    but rank 0.

    The directory is locked within the block. A run whose block completes is done; if the block
    raises, the run is failed, or interrupted (Ctrl-C, SystemExit, or a generator that is not
    resumed). All processes must enter it together.

    Args:
        directory: the run directory.
        config: what distinguishes runs.
        goes_on: whether the caller has the state of a checkpoint. Without one, an existing run that
            has not ended starts over.
        first: fields of a new run's record.

    Raises:
        StoreError: if the directory holds a run with another configuration, one that is done and
            is not continued, or one in use by another process; in every process.
        ConfigError: if two values of `config` would have the same name; in the others StoreError.
    """
    with ExitStack() as stack:
        run = None
        try:
            run = _opened(stack, RunDirectory(directory), config, goes_on, first)
            yield run
        except BaseException as error:
            leave(error)
            if run is not None:
                _end(run, error)
            raise
        if run is not None:
            run.store.compact()
            run.record.finish("done")


def _opened(
    stack: ExitStack,
    run: RunDirectory,
    config: Mapping[str, Any],
    goes_on: bool,
    first: Mapping[str, Any],
) -> RecordedRun | None:
    """What rank 0 has opened; an error there is raised in all processes."""
    opened, refused = None, None
    if rank() == 0:
        try:
            stack.enter_context(run.locked())
            opened = RecordedRun(_begun(run, config, goes_on, first), run.store())
        except (ConfigError, StoreError) as error:
            refused = error
    told = gathered(None if refused is None else str(refused))[0]
    if told is not None:
        raise refused or StoreError(told)
    return opened


def _begun(
    run: RunDirectory, config: Mapping[str, Any], goes_on: bool, first: Mapping[str, Any]
) -> RunRecord:
    run.require_same(config)
    if run.state == RunState.DONE:
        if not goes_on:
            raise StoreError(
                f"A directory can hold only one run; the one in {run.path} is done. Choose another "
                "directory, delete that one, or resume from one of its checkpoints with resume=."
            )
        record = run.require_record()
        record.restart()
        return record
    if run.record is not None and not goes_on:
        log.warning("without resume= the run in %s starts over", run.path)
    return run.create_or_resume(config, retry=True, **first)


def _end(run: RecordedRun, error: BaseException) -> None:
    interrupted = isinstance(error, StoppedError) or not isinstance(error, Exception)
    with noted(error):  # the record is still written if the rows cannot be
        run.store.flush(run.record.step)
    try:
        run.record.finish("interrupted" if interrupted else "failed", error=error)
    except StoreError as refused:
        log.error("run.json cannot record how the run ended: %s", str(refused))
