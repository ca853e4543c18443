"""A run shows that it is alive whatever it is doing, and stops doing so when it ends."""

import json
import os
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import nerve
from nerve.errors import StoreError
from nerve.recording import heartbeat
from nerve.recording.heartbeat import Heartbeat
from nerve.storage.record import RunRecord


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.01)


@pytest.fixture
def record(tmp_path) -> RunRecord:
    return RunRecord.create(tmp_path / "run", {})


@pytest.fixture
def beats(monkeypatch) -> list[float]:
    """The times at which the records of this process are written."""
    times: list[float] = []
    write = RunRecord._write

    def timed(record: RunRecord) -> None:
        times.append(time.monotonic())
        write(record)

    monkeypatch.setattr(RunRecord, "_write", timed)
    return times


def wait_for(beats: list[float], n: int) -> None:
    """Waits for so many more, while this thread does nothing for the run."""
    n, until = n + len(beats), time.monotonic() + 60.0
    while len(beats) < n:
        assert time.monotonic() < until, "no heartbeat"
        time.sleep(0.001)


def assert_ended(beats: list[float]) -> None:
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}
    n = len(beats)
    time.sleep(0.05)
    assert len(beats) == n


def read(record: RunRecord) -> dict:
    return json.loads((record.directory / "run.json").read_text())


def test_it_beats_while_data_are_prepared_and_not_after_the_end(record, beats):
    with Heartbeat(record):
        wait_for(beats, 2)
    assert_ended(beats)


def test_an_error_ends_it(record, beats):
    with pytest.raises(ValueError, match="no data"), Heartbeat(record):
        raise ValueError("no data")
    assert_ended(beats)


def test_it_beats_at_its_interval_whatever_else_writes_the_record(record, monkeypatch):
    """A step that has just written it does not make the heartbeat skip a turn."""
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.1)
    turns: list[float] = []
    update = RunRecord.update

    def noted(self: RunRecord, **changes) -> None:
        if threading.current_thread().name == "heartbeat":
            turns.append(time.monotonic())
        else:
            update(self, **changes)

    monkeypatch.setattr(RunRecord, "update", noted)
    began = time.monotonic()
    with Heartbeat(record):
        while len(turns) < 4:
            assert time.monotonic() < began + 60.0
            record.update(step=record.step + 1)
            time.sleep(0.01)
    gaps = [later - earlier for earlier, later in pairwise([began, *turns])]
    assert sorted(gaps)[1] < 0.18  # one that skips a turn has gaps of twice the interval


def test_it_writes_the_step_and_when_the_step_changed(record, beats, monkeypatch):
    """So that a run which lives without getting anywhere can be told from one that does."""
    times = (f"2026-01-01T00:00:{second:02}+00:00" for second in range(60))
    monkeypatch.setattr("nerve.recording.heartbeat.now", lambda: next(times))
    with Heartbeat(record) as beat:
        wait_for(beats, 2)
        assert read(record)["advanced"] == record.started
        beat.note_step(3)
        wait_for(beats, 3)
        first = read(record)
        beat.note_step(4)
        wait_for(beats, 2)
        second = read(record)
    assert (first["step"], first["advanced"]) == (3, "2026-01-01T00:00:00+00:00")
    assert (second["step"], second["advanced"]) == (4, "2026-01-01T00:00:01+00:00")


def test_a_beat_that_is_refused_ends_the_run_at_its_next_step(record, beats):
    """Unless the directory is back by then."""
    moved = record.directory.with_name("moved")
    with Heartbeat(record) as beat:
        record.directory.rename(moved)
        wait_for(beats, 2)
        with pytest.raises(StoreError, match="no longer exists"):
            beat.note_step(1)
        moved.rename(record.directory)
        beat.note_step(2)
        wait_for(beats, 2)
        assert read(record)["step"] == 2


def test_two_threads_that_update_a_record_leave_it_whole(record):
    with Heartbeat(record):
        for step in range(100):
            record.update(step=step)
            assert RunRecord.load(record.directory).step == step


def test_a_write_that_fails_takes_back_nothing_that_another_thread_has_set(record, monkeypatch):
    """The heartbeat fails while training sets the step."""

    def refuse(self: RunRecord) -> None:
        self.step = 7
        raise StoreError("no space")

    monkeypatch.setattr(RunRecord, "_write", refuse)
    heard = record.heartbeat
    with pytest.raises(StoreError, match="no space"):
        record.update(heartbeat="2026-01-01T00:00:00+00:00")
    assert (record.step, record.heartbeat) == (7, heard)


class Slow(nn.Module):
    """An FFN in whose forward pass the run is awaited to beat."""

    def __init__(self, beats: list[float]) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.Linear(4, 12), nn.GELU(), nn.Linear(12, 4))
        self.beats = beats
        self.is_slow = False

    def forward(self, x):
        if self.is_slow:
            wait_for(self.beats, 2)
        return self.ffn(x)


def test_a_measurement_beats_however_long_it_takes(tmp_path, beats):
    torch.manual_seed(0)
    model = Slow(beats)
    ffns = nerve.find_ffns(model, torch.randn(9, 4))
    model.is_slow = True
    nerve.measure(model, [torch.randn(40, 4)], into=tmp_path, ffns=ffns)
    assert_ended(beats)


@pytest.mark.parametrize("heldout", [True, False])
def test_a_watched_loop_beats_in_an_evaluation_and_between_two_steps(tmp_path, beats, heldout):
    torch.manual_seed(0)
    model = Slow(beats)
    ffns, batch = nerve.find_ffns(model, torch.randn(9, 4)), torch.randn(40, 4)
    model.is_slow = True
    given = {"heldout": [batch]} if heldout else {}
    with nerve.watch(model, tmp_path, every_n_steps=1, ffns=ffns, **given) as run:
        model(batch)
        run.step()
        wait_for(beats, 2)
    assert_ended(beats)


LEFT_OPEN = """
import time
from contextlib import contextmanager
from nerve.recording import heartbeat
from nerve.storage.record import RunRecord

heartbeat.EVERY_S = 0.0  # it is writing whenever the program ends
record = RunRecord.create("run", {})

@contextmanager
def run():
    with heartbeat.Heartbeat(record):
        yield

left = run()
left.__enter__()
time.sleep(0.05)
"""


def test_a_run_that_is_left_open_does_not_keep_the_program_from_ending(tmp_path):
    """When Python clears its modules and so closes the run, threads have been frozen: waiting for
    one would take forever."""
    path = os.pathsep.join([str(Path(nerve.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
