"""What a run directory tells of its run: lock, record and heartbeat together."""

import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from nerve.storage.record import DamagedRecordError, RunRecord
from nerve.storage.state import (
    FRESH,
    RunIsBusyError,
    RunLock,
    RunState,
    run_state,
    wait_for_silence,
)


def on_host(record: RunRecord, host: str, age: timedelta) -> None:
    """Makes the record one of another host whose heart beat last `age` ago."""
    beat = datetime.now(UTC) - age
    record.update(host=host, heartbeat=beat.isoformat(timespec="seconds"))


def test_a_directory_without_a_record_is_new(tmp_path):
    assert run_state(tmp_path / "nowhere") == RunState.NEW
    (tmp_path / "checkpoints").mkdir()
    assert run_state(tmp_path) == "new"


@pytest.mark.parametrize("status", ["done", "failed", "interrupted"])
def test_a_run_that_has_ended_is_what_it_says(tmp_path, status):
    RunRecord.create(tmp_path, {}).finish(status)
    assert run_state(tmp_path) == status


def test_a_running_run_is_alive_while_its_lock_is_held_and_dead_without(tmp_path):
    lock = RunLock(tmp_path)
    assert run_state(tmp_path) == RunState.ALIVE  # about to begin
    record = RunRecord.create(tmp_path, {})
    assert run_state(tmp_path) == RunState.ALIVE
    lock.release()
    assert run_state(tmp_path) == RunState.DEAD
    record.finish("interrupted")
    lock = RunLock(tmp_path)
    assert run_state(tmp_path) == RunState.ALIVE  # about to go on
    record.finish("done")
    assert run_state(tmp_path) == RunState.DONE
    lock.release()


def test_a_run_of_another_host_is_alive_while_its_heart_beats(tmp_path):
    """Locks may not reach across hosts; on this host the lock alone decides."""
    RunLock(tmp_path).release()
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", timedelta(0))
    assert run_state(tmp_path) == RunState.ALIVE
    on_host(record, "elsewhere", FRESH + timedelta(seconds=1))
    assert run_state(tmp_path) == RunState.DEAD
    on_host(record, socket.gethostname(), timedelta(0))
    assert run_state(tmp_path) == RunState.DEAD


def test_a_run_that_never_took_a_lock_is_alive_while_its_heart_beats(tmp_path):
    """As one that code of the user's own records."""
    record = RunRecord.create(tmp_path, {})
    assert run_state(tmp_path) == RunState.ALIVE
    on_host(record, socket.gethostname(), FRESH + timedelta(seconds=1))
    assert run_state(tmp_path) == RunState.DEAD


def test_a_damaged_record_is_no_state(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DamagedRecordError):
        run_state(tmp_path)


def test_a_start_waits_until_the_heart_of_another_host_is_old(tmp_path):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", FRESH - timedelta(seconds=1))
    began = time.monotonic()
    wait_for_silence(tmp_path)
    assert time.monotonic() - began < 5
    assert run_state(tmp_path) == RunState.DEAD


def test_a_start_gives_way_to_a_heart_that_beats_on(tmp_path):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", timedelta(seconds=20))
    beat = threading.Timer(0.3, on_host, [record, "elsewhere", timedelta(0)])
    beat.start()
    with pytest.raises(RunIsBusyError, match="elsewhere"):
        wait_for_silence(tmp_path)
    beat.join()
