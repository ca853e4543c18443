"""What a run directory says about its run, and what happens when a run starts in it."""

import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from nerve.errors import StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.record_file import DamagedRecordError, NoRecordError
from nerve.storage.state import FRESH, RunIsBusyError, RunLock, RunState
from nerve.storage.store import RunStore


def on_host(record: RunRecord, host: str, age: timedelta) -> None:
    """Makes the record that of another host whose last heartbeat was `age` ago."""
    beat = datetime.now(UTC) - age
    record.update(host=host, heartbeat=beat.isoformat(timespec="seconds"))


def test_a_directory_without_a_record_is_new(tmp_path):
    assert RunDirectory(tmp_path / "nowhere").state == RunState.NEW
    (tmp_path / "checkpoints").mkdir()
    assert RunDirectory(tmp_path).state == "new"


@pytest.mark.parametrize("status", ["done", "failed", "interrupted"])
def test_a_run_that_has_ended_is_what_it_says(tmp_path, status):
    RunRecord.create(tmp_path, {}).finish(status)
    assert RunDirectory(tmp_path).state == status


def test_a_running_run_is_alive_while_its_lock_is_held_and_dead_without(tmp_path):
    lock = RunLock(tmp_path)
    assert RunDirectory(tmp_path).state == RunState.ALIVE  # about to begin
    record = RunRecord.create(tmp_path, {})
    assert RunDirectory(tmp_path).state == RunState.ALIVE
    lock.release()
    assert RunDirectory(tmp_path).state == RunState.DEAD
    record.finish("interrupted")
    lock = RunLock(tmp_path)
    assert RunDirectory(tmp_path).state == RunState.ALIVE  # about to go on
    record.finish("done")
    assert RunDirectory(tmp_path).state == RunState.DONE
    lock.release()


def test_a_run_of_another_host_is_alive_while_its_heart_beats(tmp_path):
    """Locks may not reach across hosts; on the same host, only the lock decides."""
    RunLock(tmp_path).release()
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", timedelta(0))
    assert RunDirectory(tmp_path).state == RunState.ALIVE
    on_host(record, "elsewhere", FRESH + timedelta(seconds=1))
    assert RunDirectory(tmp_path).state == RunState.DEAD
    on_host(record, socket.gethostname(), timedelta(0))
    assert RunDirectory(tmp_path).state == RunState.DEAD


def test_a_run_that_never_took_a_lock_is_alive_while_its_heart_beats(tmp_path):
    """Such as a run recorded by user code."""
    record = RunRecord.create(tmp_path, {})
    assert RunDirectory(tmp_path).state == RunState.ALIVE
    on_host(record, socket.gethostname(), FRESH + timedelta(seconds=1))
    assert RunDirectory(tmp_path).state == RunState.DEAD


def test_a_damaged_record_is_no_state(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DamagedRecordError):
        _ = RunDirectory(tmp_path).state


@pytest.mark.parametrize("left", ["checkpoint", "parts", "list of parts"])
def test_a_record_that_is_gone_is_told_as_what_it_is(tmp_path, row, left):
    """It must not count as a new run, whose start would drop or mix up the old rows."""
    store = RunStore(tmp_path, RunRecord.create(tmp_path, {}).run_id)
    store.append_metrics([row(0)])
    store.flush(0)
    run = RunDirectory(tmp_path)
    run.checkpoint("last").parent.mkdir()
    run.checkpoint("last").write_bytes(b"")
    (tmp_path / "run.json").unlink()
    if left != "checkpoint":
        run.checkpoint("last").unlink()
    if left != "list of parts":
        (tmp_path / ".parts.json").unlink()
    if left != "parts":
        (tmp_path / "metrics" / "part-000000000000.parquet").unlink()
    before = sorted(tmp_path.rglob("*"))
    for ask in (
        lambda: run.state,
        lambda: run.record,
        lambda: run.n_starts,
        lambda: run.create_or_resume({}),
        lambda: run.is_done({}),
        lambda: run.store(),
    ):
        with pytest.raises(DamagedRecordError, match=r"run\.json is missing, but .*Restore it"):
            ask()
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_nobodys_run_is_new(tmp_path):
    """Checkpoints and parts of other programs."""
    for name in ("checkpoints/epoch=3.ckpt", "metrics/part-00000-ab.snappy.parquet", "x/a.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert RunDirectory(tmp_path).state == "new"
    assert RunDirectory(tmp_path / "x" / "a.parquet").state == "new"


def test_a_start_waits_until_the_heart_of_another_host_is_old(tmp_path):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", FRESH - timedelta(seconds=1))
    began = time.monotonic()
    again = RunDirectory(tmp_path).create_or_resume({})
    assert time.monotonic() - began < FRESH.total_seconds() / 2
    assert (again.restarts, again.host) == (1, socket.gethostname())


@pytest.mark.parametrize(
    "ahead", [timedelta(minutes=10), timedelta(days=400), timedelta(seconds=90)]
)
def test_a_heart_that_beat_in_the_future_is_waited_for_a_minute_of_ones_own(
    tmp_path, monkeypatch, ahead
):
    """The clock of the host that wrote it is ahead; by that clock, the wait would never end."""
    on_host(RunRecord.create(tmp_path, {}), "elsewhere", -ahead)
    assert RunDirectory(tmp_path).state == RunState.DEAD
    clock = Clock(monkeypatch)
    assert RunDirectory(tmp_path).create_or_resume({}).restarts == 1
    assert FRESH.total_seconds() <= clock.now < FRESH.total_seconds() + 5


def test_a_heart_that_beats_on_in_the_future_is_given_way_to(tmp_path, monkeypatch):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", -timedelta(minutes=10))
    clock = Clock(monkeypatch)
    clock.at_20_s = lambda: on_host(record, "elsewhere", -timedelta(minutes=11))
    with pytest.raises(RunIsBusyError, match="elsewhere"):
        RunDirectory(tmp_path).create_or_resume({})


class Clock:
    """Time that only passes in sleep."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        self.at_20_s = lambda: None
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 1000
        if self.now == 20:
            self.at_20_s()


def test_a_start_gives_way_to_a_heart_that_beats_on(tmp_path):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", timedelta(seconds=20))
    beat = threading.Timer(0.3, on_host, [record, "elsewhere", timedelta(0)])
    beat.start()
    with pytest.raises(RunIsBusyError, match="elsewhere"):
        RunDirectory(tmp_path).create_or_resume({})
    beat.join()
    assert RunRecord.load(tmp_path).restarts == 0


def test_a_run_that_another_host_ends_in_the_meantime_is_left_as_it_is(tmp_path, monkeypatch):
    record = RunRecord.create(tmp_path, {})
    on_host(record, "elsewhere", timedelta(0))
    monkeypatch.setattr(time, "sleep", lambda seconds: record.finish("done"))
    found = RunDirectory(tmp_path).create_or_resume({})
    assert (found.run_status, found.restarts, found.host) == ("done", 0, "elsewhere")


@pytest.fixture
def n_reads(monkeypatch):
    """How often a record has been read so far."""
    load, reads = RunRecord.load, []

    def counted(path):
        record = load(path)
        reads.append(path)
        return record

    monkeypatch.setattr(RunRecord, "load", counted)
    return lambda: len(reads)


def test_a_record_is_read_once_and_again_when_asked_or_locked(tmp_path, n_reads):
    RunRecord.create(tmp_path, {}).finish("interrupted")
    run = RunDirectory(tmp_path)
    assert n_reads() == 0
    for _ in range(2):
        assert (run.record.restarts, run.state, run.n_starts) == (0, "interrupted", 1)
    assert n_reads() == 1
    RunRecord.load(tmp_path).finish("done")
    assert run.state == "interrupted"
    assert run.reload().state == "done"
    assert n_reads() == 3
    with run.locked():
        assert run.record.run_status == "done"
    assert n_reads() == 4


def test_what_a_start_writes_it_knows(tmp_path, n_reads):
    run = RunDirectory(tmp_path)
    with run.locked():
        record = run.create_or_resume({"lr": 0.1}, run_id="mine", sweep="s", seed=3, job={"id": 1})
        assert (record.run_id, record.sweep, record.seed, record.job) == ("mine", "s", 3, {"id": 1})
        record.finish("done")
    assert (run.record is record, run.state, n_reads()) == (True, "done", 0)
    assert run.is_done({"lr": 0.1})
    assert RunDirectory(tmp_path).record.run_status == "done"


def test_a_start_goes_on_with_what_was_interrupted_and_leaves_what_is_done(tmp_path):
    RunRecord.create(tmp_path, {"lr": 0.1}, run_id="mine").finish("interrupted")
    assert not RunDirectory(tmp_path).is_done({"lr": 0.1})
    again = RunDirectory(tmp_path).create_or_resume({"lr": 0.1}, run_id="another", job={"id": 2})
    assert (again.run_id, again.run_status, again.restarts) == ("mine", "running", 1)
    assert again.job == {"id": 2}
    again.finish("done")
    before = (tmp_path / "run.json").read_bytes()
    assert RunDirectory(tmp_path).create_or_resume({"lr": 0.1}).run_status == "done"
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize("status", ["done", "interrupted", "failed"])
def test_a_directory_of_other_values_is_refused_with_some_of_their_names(tmp_path, status):
    RunRecord.create(tmp_path, {f"k{i}": i for i in range(9)}, run_id="mine").finish(status)
    before = (tmp_path / "run.json").read_bytes()
    values = {f"k{i}": 10 + i for i in range(8)}
    some = r"k0 \(0, now 10\).*k4 \(4, now 14\) and 4 more"
    for ask in (RunDirectory.create_or_resume, RunDirectory.require_same):
        with pytest.raises(StoreError, match=some) as error:
            ask(RunDirectory(tmp_path), values)
        assert f"{tmp_path} holds run mine ({status})" in str(error.value)
        assert str(error.value).endswith("Choose another directory, or delete that one.")
    with pytest.raises(StoreError, match=r"k8 \(8, now not there\)"):
        RunDirectory(tmp_path).require_same({f"k{i}": i for i in range(8)})
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_run_that_failed_is_started_again_only_when_asked(tmp_path):
    RunRecord.create(tmp_path, {}).finish("failed", error=ValueError("the batch is rotten"))
    with pytest.raises(
        StoreError, match=r"failed with ValueError: the batch is rotten\. Fix the"
    ) as error:
        RunDirectory(tmp_path).create_or_resume({})
    assert str(error.value).endswith("add retry=True, or choose another directory.")
    again = RunDirectory(tmp_path).create_or_resume({}, retry=True)
    assert (again.run_status, again.error, again.restarts) == ("running", None, 1)


def test_a_directory_that_another_has_is_looked_at_anew(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.state == "new"
    lock = RunLock(tmp_path)
    with pytest.raises(RunIsBusyError), run.locked():
        pass
    assert run.state == "alive"
    lock.release()
    with run.locked():
        assert run.state == "new"  # the one that asks is no other


def test_a_store_of_no_run_is_refused(tmp_path):
    with pytest.raises(NoRecordError, match=r"contains run\.json"):
        RunDirectory(tmp_path).store()
    RunRecord.create(tmp_path, {}, run_id="mine")
    assert RunDirectory(tmp_path).store().run_id == "mine"


def test_an_interruption_that_the_run_has_not_recorded_is_recorded(tmp_path):
    run = RunDirectory(tmp_path)
    with run.locked():
        run.interrupt(KeyboardInterrupt())  # before there is a record
        run.create({})
        run.interrupt(KeyboardInterrupt("as it started"))
    assert RunRecord.load(tmp_path).run_status == "interrupted"
    assert RunRecord.load(tmp_path).error["message"] == "as it started"
    for status in ("done", "failed", "interrupted"):
        RunRecord.load(tmp_path).finish(status)
        with run.locked():
            run.interrupt(KeyboardInterrupt())
        assert (RunRecord.load(tmp_path).run_status, run.record.error) == (status, None)


def test_a_run_that_another_process_may_have_is_not_interrupted(tmp_path):
    run = RunDirectory(tmp_path)
    run.create({})
    run.interrupt(KeyboardInterrupt())  # without the lock
    assert RunRecord.load(tmp_path).run_status == "running"
