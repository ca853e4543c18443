"""Starts, resumes and ends a run directory for callers other than the commands."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import torch

from nerve.errors import ConfigError, StoppedError, StoreError, noted
from nerve.measuring.departures import leave
from nerve.measuring.messages import gathered
from nerve.measuring.processes import rank
from nerve.recording.heartbeat import Heartbeat
from nerve.storage.directory import RunDirectory
from nerve.storage.parts import list_parts, read_parts
from nerve.storage.record import RunRecord
from nerve.storage.schema import DATASETS
from nerve.storage.state import RunState
from nerve.storage.store import RunStore

log = logging.getLogger(__name__)


class RecordedRun(NamedTuple):
    """A run that this process records: its `run.json`, the store of its rows, and its heartbeat."""

    record: RunRecord
    store: RunStore
    heartbeat: Heartbeat


def seed_of(config: Mapping[str, Any]) -> int | None:
    """The `seed` of a caller's configuration, if it is an integer, also one of NumPy."""
    seed = config.get("seed")
    return int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else None


def device_name(device: torch.device) -> str:
    """A device as it is recorded: a GPU by its model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def recorded_run(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    *,
    resume: bool,
    how_to_resume: str,
    **first: Any,
) -> Iterator[RecordedRun | None]:
    """Records a run within the block; yields None in processes that do not record: of several, all
    but rank 0.

    Within the block, the directory is locked, and the run has a heartbeat. A run whose block
    completes is done; if the block raises, or the rows cannot be brought into their final form, the
    run is failed, or interrupted (Ctrl-C, SystemExit, or a generator that is not resumed). All
    processes must enter it together.

    Args:
        directory: the run directory.
        config: what distinguishes runs.
        resume: whether the caller has the state of a checkpoint. Without one, an existing run that
            has not ended starts over, unless it has stored measurements.
        how_to_resume: how the caller's user says so, for messages: `resume=True`.
        first: fields of a new run's record.

    Raises:
        StoreError: if the directory holds a run with another configuration, one in use by another
            process, or one that is done or has stored measurements and is not continued; in every
            process.
        ConfigError: if two values of `config` would have the same name; in the others StoreError.
    """
    with ExitStack() as stack:
        try:
            run = _opened(stack, RunDirectory(directory), config, resume, how_to_resume, first)
            yield run
            if run is not None:
                run.store.compact()
                run.record.finish("done")
        except BaseException as error:
            leave(error)
            raise


def _opened(
    stack: ExitStack,
    run: RunDirectory,
    config: Mapping[str, Any],
    resume: bool,
    how_to_resume: str,
    first: Mapping[str, Any],
) -> RecordedRun | None:
    """What rank 0 has opened; an error there is raised in all processes. An error that ends `stack`
    is recorded as the end of the run, from the moment that there is a record."""
    opened, refused = None, None
    if rank() == 0:
        try:
            stack.enter_context(run.locked())
            if not resume:
                _require_unmeasured(run, config, how_to_resume)
            record = _begun(run, config, first)
            stack.push(partial(_record_end, record))
            store = run.store()
            stack.push(partial(_write_rest, store, record))
            opened = RecordedRun(record, store, stack.enter_context(Heartbeat(record)))
        except (ConfigError, StoreError) as error:
            refused = error
    message = gathered(None if refused is None else str(refused))[0]
    if message is not None:
        raise refused or StoreError(message)
    return opened


def _require_unmeasured(run: RunDirectory, config: Mapping[str, Any], how_to_resume: str) -> None:
    """Raises `StoreError` if the directory holds a run that starting over would erase: one that is
    done, or has stored measurements."""
    run.require_same(config)
    record, metrics = run.record, DATASETS["metrics"]
    if record is None or not (run.state == RunState.DONE or list_parts(run.path, metrics)):
        return
    table, _ = read_parts(run.path, metrics, record.run_id)
    n_steps = len(table["step"].unique())
    raise StoreError(
        f"What a run has measured is not overwritten; {run.path} holds a run that is {run.state}, "
        f"with {n_steps} measured step{'' if n_steps == 1 else 's'}. Continue it with "
        f"{how_to_resume}, choose another directory, or delete that one."
    )


def _begun(run: RunDirectory, config: Mapping[str, Any], first: Mapping[str, Any]) -> RunRecord:
    record = run.create_or_resume(config, retry=True, **first)
    if record.run_status == "done":
        record.restart()
    return record


def _write_rest(
    store: RunStore, record: RunRecord, kind: object, error: BaseException | None, trace: object
) -> None:
    """Writes the buffered rows of a run that an error ends."""
    if error is not None:
        with noted(error):
            store.flush(record.step)


def _record_end(
    record: RunRecord, kind: object, error: BaseException | None, trace: object
) -> None:
    """Records how an error has ended the run, even if the rows could not be written."""
    if error is None or record.run_status == "done":
        return
    interrupted = isinstance(error, StoppedError) or not isinstance(error, Exception)
    if isinstance(error, KeyboardInterrupt) and not str(error):
        error = KeyboardInterrupt("stopped by SIGINT")
    try:
        record.finish("interrupted" if interrupted else "failed", error=error)
    except StoreError as refused:
        log.error("run.json cannot record how the run ended: %s", str(refused))
