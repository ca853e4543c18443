"""How a recorded run begins and ends, whatever comes between."""

from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from nerve.analysis.load import load_runs
from nerve.cli.console import error_text
from nerve.errors import NotGatheredError, StoreError
from nerve.recording import run
from nerve.recording.heartbeat import Heartbeat
from nerve.recording.run import RecordedRun, recorded_run
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.state import RunLock
from nerve.storage.store import RunStore

ROW = {
    "layer": 0,
    "ffn": "ffn",
    "tokens_seen": 0,
    "status": "ok",
    "n_samples": 8,
    "d_ff": 4,
    "d_in": 2,
}


def opened(
    directory: Path, *, resume: bool = False, **config: object
) -> AbstractContextManager[RecordedRun | None]:
    return recorded_run(directory, config, resume=resume, how_to_resume="again=True")


def measure(recorded: RecordedRun, *steps: int) -> None:
    for step in steps:
        recorded.store.append_metrics([{**ROW, "step": step}])
        recorded.store.flush(step)


def record_run(directory: Path, *steps: int, ends_with: BaseException | None = None) -> None:
    with opened(directory) as recorded:
        measure(recorded, *steps)
        if ends_with is not None:
            raise ends_with


def ended_with(directory: Path) -> tuple[str, str | None]:
    """The status of a run and the type of its error; the directory is free again."""
    RunLock(directory).release()
    record = RunRecord.load(directory)
    return record.run_status, record.error and record.error["type"]


def test_an_error_before_the_block_is_sent_to_the_other_processes(tmp_path, monkeypatch):
    """Otherwise they would wait half an hour for a process that has left."""
    told: list[BaseException] = []
    monkeypatch.setattr(run, "leave", told.append)

    def locked(self: RunDirectory) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "locked", locked)
    with pytest.raises(KeyboardInterrupt) as error, opened(tmp_path):
        pass
    assert told == [error.value]


@pytest.mark.parametrize(
    ("error", "text"),
    [(KeyboardInterrupt(), "KeyboardInterrupt: stopped by SIGINT"), (SystemExit(), "SystemExit")],
)
def test_an_interruption_without_a_message_is_shown_without_an_empty_one(tmp_path, error, text):
    with pytest.raises(type(error)):
        record_run(tmp_path, 0, ends_with=error)
    record = RunRecord.load(tmp_path)
    assert error_text(record.error) == text
    assert load_runs(tmp_path)["error"].tolist() == [text]


ENDINGS = [
    (KeyboardInterrupt(), "interrupted"),
    (SystemExit(1), "interrupted"),
    (StoreError("no space"), "failed"),
]


@pytest.mark.parametrize(("error", "status"), ENDINGS)
def test_a_run_that_raises_while_its_rows_are_compacted_says_how_it_ended(
    tmp_path, monkeypatch, error, status
):
    """Every row is there, and the run goes on as any other that has ended early."""

    def compact(store: RunStore) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "compact", compact)
        with pytest.raises(type(error)), opened(tmp_path) as recorded:
            measure(recorded, 0, 1)
    assert ended_with(tmp_path) == (status, type(error).__name__)
    with opened(tmp_path, resume=True):
        pass
    assert ended_with(tmp_path) == ("done", None)


@pytest.mark.parametrize(("error", "status"), ENDINGS)
def test_a_run_whose_start_raises_says_so(tmp_path, monkeypatch, error, status):
    """Once there is a record: here, as the store is opened."""

    def store(self: RunDirectory) -> None:
        raise error

    monkeypatch.setattr(RunDirectory, "store", store)
    with pytest.raises(type(error)), opened(tmp_path):
        pass
    assert ended_with(tmp_path) == (status, type(error).__name__)


def test_a_run_fails_if_another_process_does_not_come_to_its_start(tmp_path, monkeypatch):
    def gathered(told: str | None) -> list[str | None]:
        raise NotGatheredError("process 1 has stopped")

    monkeypatch.setattr(run, "gathered", gathered)
    with pytest.raises(NotGatheredError), opened(tmp_path):
        pass
    assert ended_with(tmp_path) == ("failed", "NotGatheredError")


def test_a_second_interrupt_while_the_rows_are_written_leaves_the_run_interrupted(
    tmp_path, monkeypatch
):
    def flush(store: RunStore, step: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunStore, "flush", flush)
    with pytest.raises(KeyboardInterrupt):
        record_run(tmp_path, ends_with=KeyboardInterrupt())
    assert ended_with(tmp_path) == ("interrupted", "KeyboardInterrupt")


def test_an_interrupt_after_the_end_leaves_the_run_done(tmp_path, monkeypatch):
    finish = RunRecord.finish

    def finish_late(record: RunRecord, *given, **more) -> None:
        finish(record, *given, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunRecord, "finish", finish_late)
    with pytest.raises(KeyboardInterrupt), opened(tmp_path):
        pass
    assert ended_with(tmp_path) == ("done", None)


@pytest.mark.parametrize("state", ["interrupted", "failed", "dead", "done"])
@pytest.mark.parametrize("steps", [(0,), (0, 10, 20)])
def test_what_a_run_has_measured_is_not_erased_by_starting_over(tmp_path, state, steps):
    """Whatever has ended it; only the caller's state of a checkpoint continues it."""
    errors = {"interrupted": KeyboardInterrupt(), "failed": ValueError("no")}
    if state == "dead":
        record = RunRecord.create(tmp_path, {})
        measure(RecordedRun(record, RunStore(tmp_path, record.run_id), Heartbeat(record)), *steps)
        RunLock(tmp_path).release()
    elif state == "done":
        record_run(tmp_path, *steps)
    else:
        with pytest.raises(type(errors[state])):
            record_run(tmp_path, *steps, ends_with=errors[state])
    before = RunRecord.load(tmp_path)
    number = "1 measured step" if len(steps) == 1 else "3 measured steps"
    with (
        pytest.raises(StoreError, match=rf"is {state}, with {number}\. Continue it with again=Tr"),
        opened(tmp_path),
    ):
        pass
    assert RunRecord.load(tmp_path) == before
    with opened(tmp_path, resume=True) as recorded:
        assert recorded.record.run_id == before.run_id
        assert recorded.record.restarts == 1


def test_a_run_that_has_measured_nothing_starts_over_unless_it_is_done(tmp_path):
    """There is nothing to lose: a program that fails before its first measurement is repeated."""
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            record_run(tmp_path, ends_with=ValueError("no"))
    with opened(tmp_path) as recorded:
        assert recorded.record.restarts == 2
    with (
        pytest.raises(StoreError, match=r"is done, with 0 measured steps\. .* another directory"),
        opened(tmp_path),
    ):
        pass


def test_a_run_of_another_configuration_is_not_continued_by_anyone(tmp_path):
    with opened(tmp_path, lr=1) as recorded:
        measure(recorded, 0)
    for resume in (False, True):
        with (
            pytest.raises(StoreError, match=r"other values of lr \(1, now 2\)"),
            opened(tmp_path, lr=2, resume=resume),
        ):
            pass
