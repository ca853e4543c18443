"""SIGKILL, a full disk and a second process do nothing to a run that resuming cannot repair."""

import contextlib
import errno
import io
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from multiprocessing import Pipe
from pathlib import Path

import pytest
from processes import ended, start

import nerve
from nerve import files as atomic
from nerve.errors import StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.state import RunState
from nerve.training.checkpoint_files import read_checkpoint

from .killer import kill

LONGER = ["trainer.max_steps=30", "checkpoint.every_n_steps=3", "model.dropout=0.1"]
LONGER += ["model.n_layers=1"]
READERS = (nerve.load_metrics, nerve.load_spectra, nerve.load_scalars)


def assert_readable(directory: Path) -> RunState:
    """Checks that all files are complete and rows reach the checkpoint; returns the state."""
    state = RunDirectory(directory).state
    if state == RunState.NEW:
        return state
    last = RunDirectory(directory).checkpoint("last")
    saved = read_checkpoint(last) if last.exists() else None
    if RunDirectory(directory).checkpoint("best").exists():
        read_checkpoint(RunDirectory(directory).checkpoint("best"))
    assert len(nerve.load_runs(directory)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nerve.IncompleteWarning)  # killed before any row
        frames = [load(directory) for load in READERS]
    if saved and "global_step" in saved:
        for frame in frames:
            assert frame.step.max() >= saved["global_step"] - 1
    return state


@pytest.mark.parametrize(
    ("seed", "n_kills"),
    [(0, 15), pytest.param(1, 400, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_a_run_killed_at_random_moments_ends_like_an_undisturbed_one(
    small, assert_same, tmp_path, seed, n_kills
):
    """SIGKILLs during flush, compaction, checkpoint and measurement, each followed by a look at
    what is left, and a resume."""
    ours, theirs = Pipe()
    log = tmp_path / "killer.log"
    killer = start(kill, theirs, seed, n_kills, [*small, *LONGER], cwd=tmp_path, log=log)
    theirs.close()
    directories, killed = set(), 0
    with contextlib.suppress(EOFError):
        while True:
            directory, killed = ours.recv()
            directories.add(directory)
            state = assert_readable(tmp_path / directory)
            assert state in (RunState.NEW, RunState.DEAD, RunState.DONE)
            ours.send(None)
    assert ended(killer) == 0, log.read_text()
    assert killed == n_kills
    for directory in directories:
        assert_same("whole", directory)


class Disk:
    """Has room for this many bytes in the files of a run; then every write fails halfway."""

    def __init__(self, room: int) -> None:
        self.room = room

    def open(self, path: Path, mode: str) -> io.BufferedWriter:
        disk = self

        class File(io.FileIO):
            def write(self, data) -> int:
                fits = bytes(data)[: disk.room]
                disk.room -= len(fits)
                super().write(fits)
                if len(fits) < len(data):
                    raise OSError(errno.ENOSPC, "No space left on device")
                return len(fits)

        return io.BufferedWriter(File(path, mode))


def test_a_full_disk_costs_the_work_since_the_last_checkpoint_and_no_file(
    experiment, assert_same, monkeypatch, tmp_path
):
    """Each attempt has a little more room than the one before it; in the last there is enough.
    A run that cannot even write how it ended is as good as killed."""
    experiment("whole", *LONGER)
    states = []
    for room in (0, 3_000, 8_000, 20_000, 60_000, 150_000, 300_000, 600_000):
        with monkeypatch.context() as patch:
            patch.setattr(atomic, "open", Disk(room).open, raising=False)
            with pytest.raises(StoreError, match="No space left on device") as error:
                experiment("pieces", "retry=true", *LONGER)
            assert "Free up space or quota" in str(error.value)
        states.append(assert_readable(tmp_path / "pieces"))
    assert len(list((tmp_path / "pieces" / "metrics").glob("*.parquet"))) > 0
    experiment("pieces", "retry=true", *LONGER)
    assert_same("whole", "pieces")
    assert set(states) == {RunState.NEW, RunState.DEAD}, states


# In a name space of its own, where any user may mount: a disk that is soon full, then larger.
ON_A_SMALL_DISK = """
set -e
mkdir disk
mount -t tmpfs -o size=$ROOM tmpfs disk
! nerve_run 2> errors
grep -q "No space left on device" errors
test "$(cat disk/run/metrics/*.parquet | wc -c)" -gt 0
mount -o remount,size=100m disk
nerve_run
cp -r disk/run pieces
"""


def can_mount() -> bool:
    command = shlex.split("unshare --user --map-root-user --mount mount -t tmpfs tmpfs /mnt")
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(command, capture_output=True).returncode
    )


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="may not mount a file system")
@pytest.mark.parametrize("room", ["120k", "400k"])
def test_a_file_system_that_is_really_full(small, experiment, assert_same, tmp_path, room):
    experiment("whole", *LONGER)
    run = [sys.executable, "-m", "nerve.cli.run", *small, *LONGER, "retry=true"]
    script = f"nerve_run() {{ {shlex.join(run)} hydra.run.dir=disk/run; }}\n{ON_A_SMALL_DISK}"
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    ended = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=tmp_path,
        env=environment | {"ROOM": room},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same("whole", "pieces")
