"""After SIGKILL, `nerve-probe` keeps what it has measured and measures the rest."""

import contextlib
import gc
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from processes import ended, start
from trained import assert_same_run, llama, probed, save_series

from nerve.cli.probing import folders, run  # noqa: F401 - what each piece would import
from nerve.storage.directory import RunDirectory

from .killer import kill_probes


def kill_pieces(n_kills: int) -> None:
    """Probes in pieces, each of which is killed at a change to the file system."""
    llama()  # likewise
    gc.freeze()  # for each checkpoint garbage is collected
    rng, kills, n_done, status = random.Random(n_kills), 0, 0, 1
    while kills < n_kills or status:
        moment = rng.randrange(1, 60) if kills < n_kills else None
        child = os.fork()
        if not child:
            _piece(moment)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        kills += status != 0
        if kills < n_kills and not status:
            shutil.move("out", f"done{n_done}")
            n_done += 1
    assert kills == n_kills


def _piece(moment: int | None) -> None:
    status = 1
    with contextlib.suppress(BaseException):
        if moment is not None:
            _count_down(moment)
        status = probed("ckpt/step_*")[0]
    os._exit(status)


def _count_down(left: int) -> None:
    def dying(change):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
        setattr(owner, name, dying(getattr(owner, name)))


@pytest.mark.parametrize(
    ("n_checkpoints", "n_kills"), [(4, 3), pytest.param(8, 20, marks=pytest.mark.slow)]
)
def test_a_killed_series_ends_like_an_undisturbed_one(
    n_checkpoints, n_kills, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    save_series(range(n_checkpoints))
    assert probed("ckpt/step_*")[0] == 0
    shutil.move("out", "whole")
    log = tmp_path / "killer.log"
    killer = start(kill_probes, n_kills, cwd=tmp_path, log=log)
    assert ended(killer) == 0, log.read_text()
    for directory in ("out", *Path().glob("done*")):
        assert RunDirectory(directory).state == "done"
        assert_same_run("whole", str(directory))
