"""One process per run directory, whatever happens to the process that had it."""

import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

from nerve.errors import StoreError
from nerve.files import _say_once
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord
from nerve.storage.state import RunIsBusyError, RunLock, RunState, holder, is_locked

HOLD = """
import sys
from nerve.storage.state import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of `<tmp_path>/run` until it ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


def test_a_second_process_is_told_who_runs(tmp_path, other):
    directory = tmp_path / "run"
    assert is_locked(directory)
    with pytest.raises(RunIsBusyError) as error:
        RunLock(directory)
    for text in (str(directory), f"process {other.pid} on host {socket.gethostname()}"):
        assert text in str(error.value)
    assert isinstance(error.value, StoreError)


def test_the_lock_of_a_killed_process_is_free(tmp_path, other):
    directory = tmp_path / "run"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert not is_locked(directory)
    lock = RunLock(directory)
    assert holder(directory) == {"host": socket.gethostname(), "pid": os.getpid()}
    assert holder(str(directory)) == holder(directory)
    lock.release()


def test_a_lock_is_free_once_released(tmp_path):
    for _ in range(2):
        lock = RunLock(tmp_path)
        assert is_locked(tmp_path)
        lock.release()
        lock.release()
        assert not is_locked(tmp_path)


def test_whoever_only_asks_keeps_no_one_from_starting(tmp_path):
    """Reading the state holds a shared lock for an instant; a start waits for that instant."""
    RunLock(tmp_path).release()
    with open(tmp_path / ".lock") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert not is_locked(tmp_path)
        release = subprocess.Popen(["sleep", "0.2"], pass_fds=[asking.fileno()])
    lock = RunLock(tmp_path)  # the lock goes with the last process that has the file open
    release.wait()
    lock.release()


def test_a_process_that_the_holder_started_does_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    child = subprocess.Popen(["sleep", "5"], close_fds=False)
    lock.release()
    assert not is_locked(tmp_path)
    child.kill()
    child.wait()


def test_a_start_that_a_full_disk_refuses_leaves_no_lock(tmp_path):
    """Also while its error is still being looked at."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(StoreError, match=r"\.lock") as refused:
            RunLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert refused.tb is not None
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"host": ', "\x00"])
def test_a_lock_that_does_not_say_whose_it_is_still_locks(tmp_path, other, content):
    (tmp_path / "run" / ".lock").write_text(content)
    with pytest.raises(RunIsBusyError, match="in use by another process"):
        RunLock(tmp_path / "run")


def test_no_directory_is_not_locked(tmp_path):
    assert not is_locked(tmp_path / "nowhere")
    assert holder(tmp_path / "nowhere") == {}
    assert not (tmp_path / "nowhere").exists()


NO_LOCKS = ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EBADF", "EINVAL", "EPERM", "EIO", "EACCES"]


@pytest.fixture(params=NO_LOCKS)
def without_locks(request, monkeypatch):
    """A file system that refuses locks, in several ways; a start does not wait a second there."""
    code = getattr(errno, request.param)

    def refuse(*args):
        raise OSError(code, os.strerror(code))

    _say_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr("nerve.storage.state.PATIENCE_S", 0.0)


@pytest.mark.usefixtures("without_locks")
def test_a_file_system_without_locks_is_said_once_and_does_not_stop_a_run(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            lock = RunLock(tmp_path)
            assert not lock.is_held
            assert is_locked(tmp_path) is None
            lock.release()
    assert caplog.text.count("no locks") == 1


@pytest.mark.usefixtures("without_locks")
def test_without_locks_the_heartbeat_decides_also_on_one_host(tmp_path, monkeypatch):
    """A run of this host whose lock file exists is alive while its heartbeat is fresh, and left
    alone; otherwise it is dead, and resumed."""
    RunLock(tmp_path).release()
    record = RunRecord.create(tmp_path, {})
    assert RunDirectory(tmp_path).state == RunState.ALIVE
    run = RunDirectory(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: record.update(heartbeat=at(1)))
        with run.locked(), pytest.raises(RunIsBusyError, match="which still updates its heartbeat"):
            run.create_or_resume({})
    record.update(heartbeat=at(-61))
    assert RunDirectory(tmp_path).state == RunState.DEAD
    with run.locked():
        assert run.create_or_resume({}).restarts == 1


def at(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.mark.usefixtures("without_locks")
def test_of_two_that_start_at_once_without_locks_one_goes_on(tmp_path, monkeypatch):
    """The one that is named last; the other checks again before it begins."""

    def another_starts(seconds: float) -> None:
        (tmp_path / ".lock").write_text('{"host": "elsewhere", "pid": 7}')

    monkeypatch.setattr(time, "sleep", another_starts)
    with pytest.raises(RunIsBusyError, match="process 7 on host elsewhere"):
        RunLock(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    RunLock(tmp_path).release()


def test_a_lock_file_that_cannot_be_opened_tells_nothing(tmp_path, monkeypatch):
    """For example, that of another user: the heartbeat decides."""
    RunLock(tmp_path).release()
    RunRecord.create(tmp_path, {})
    real = os.open

    def refuse(path, *args):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    assert is_locked(tmp_path) is None
    assert RunDirectory(tmp_path).state == RunState.ALIVE


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        RunLock(tmp_path / "file" / "run")
