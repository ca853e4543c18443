"""What SIGKILL, a full disk and a second process do to a run: nothing that a resume cannot fix."""

import errno
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from subprocess import PIPE

import pytest

import nerve
from nerve import files as atomic
from nerve.errors import StoreError
from nerve.storage.directory import RunDirectory
from nerve.storage.state import RunState
from nerve.training.checkpoint_files import read_checkpoint

LONGER = ["trainer.max_steps=30", "checkpoint.every_n_steps=3", "model.dropout=0.1"]
LONGER += ["model.n_layers=1"]
READERS = (nerve.load_metrics, nerve.load_spectra, nerve.load_scalars)

# Imports and composes once, then forks a process for each piece of a run, and kills it: every other
# one after a random time, the others before or after the k-th change that they make to the file
# system. Pieces are short, so that most of them are killed.
KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict, read_write
from nerve.cli.config.compose import CONF, register
from nerve.cli.experiment.run import run_experiment

def composed(arguments):
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", arguments, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config

def piece(directory, moment):
    child = os.fork()
    if child:
        return child
    sys.stdout = sys.stderr = open(f"{directory}.log", "a")
    hydra_config = HydraConfig.get()
    with read_write(hydra_config):
        hydra_config.runtime.output_dir = os.path.abspath(directory)
    if moment is not None:
        count_down(moment)
    status = 1
    try:
        run_experiment(config, hydra_config)
        status = 0
    finally:
        if status:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)

def count_down(left):
    def tick():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def dying(change):
        def call(*args, **kwargs):
            tick()
            result = change(*args, **kwargs)
            tick()
            return result
        return call
    for owner, name in ((os, "replace"), (os, "fsync"), (os, "open"), (Path, "unlink")):
        setattr(owner, name, dying(getattr(owner, name)))

def end_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

seed, n_kills, config = int(sys.argv[1]), int(sys.argv[2]), composed(sys.argv[3:])
began = time.monotonic()
assert end_of(piece("whole", None)) == 0
duration = time.monotonic() - began
rng, kills, runs, status = random.Random(seed), 0, 0, 0
while kills < n_kills or status:
    if not status:
        directory, runs = f"pieces{runs}", runs + 1
    if kills >= n_kills:
        child = piece(directory, None)
    elif rng.random() < 0.5:
        child = piece(directory, rng.randrange(1, 150))
    else:
        child = piece(directory, None)
        time.sleep(rng.uniform(0.05, 0.4) * duration)
        os.kill(child, signal.SIGKILL)
    status = end_of(child)
    assert status in (0, -signal.SIGKILL), open(f"{directory}.log").read()
    kills += status != 0
    print(json.dumps([directory, kills]), flush=True)
    sys.stdin.readline()  # until what is left has been looked at
"""


def assert_readable(directory: Path) -> RunState:
    """Every file that is there is whole, and rows reach as far as the checkpoint; the state."""
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
    [(0, 36), pytest.param(1, 400, marks=[pytest.mark.slow, pytest.mark.timeout(900)])],
)
def test_a_run_that_is_killed_at_random_moments_ends_as_one_that_was_not(
    small, assert_same, tmp_path, seed, n_kills
):
    """Dozens of SIGKILLs, during flush, compaction, checkpoint and measurement, each followed by a
    look at what is left, and a resume."""
    command = [sys.executable, "-c", KILLER, str(seed), str(n_kills), *small, *LONGER]
    with (
        open(tmp_path / "killer.log", "w") as errors,
        subprocess.Popen(
            command, cwd=tmp_path, stdin=PIPE, stdout=PIPE, stderr=errors, text=True
        ) as killer,
    ):
        directories, killed = set(), 0
        for line in killer.stdout:
            directory, killed = json.loads(line)
            directories.add(directory)
            state = assert_readable(tmp_path / directory)
            assert state in (RunState.NEW, RunState.DEAD, RunState.DONE)
            killer.stdin.write("\n")
            killer.stdin.flush()
    assert killer.wait() == 0, (tmp_path / "killer.log").read_text()
    assert killed == n_kills
    for directory in directories:
        assert_same("whole", directory)


class Disk:
    """Room for so many bytes in the files of a run; then every write is refused, half done."""

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
            assert "Free space or quota" in str(error.value)
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
