"""A real Slurm for the session, and sweeps that are submitted to it."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from .cluster import PATH, PROGRAMS, Cluster
from .sweep import Sweep


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Slurm, running and idle. Without its packages the test is skipped; with CI=true it fails."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        reason = f"Slurm's packages of .ci/apt.txt are not installed: no {', '.join(missing)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    root = Path(tempfile.mkdtemp(prefix="nerve-slurm-"))  # short, as paths of sockets must be
    root.chmod(0o755)
    started = Cluster(root)
    try:
        started.start()
        yield started
    finally:
        started.stop()
        shutil.rmtree(root, ignore_errors=True)  # what has been killed may still be writing


@pytest.fixture(scope="session")
def new_sweep(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Sweep]]:
    """Creates a sweep in a separate folder."""
    sweeps: list[Sweep] = []

    def make(name: str) -> Sweep:
        sweeps.append(Sweep(cluster, tmp_path_factory.mktemp(name)))
        return sweeps[-1]

    yield make
    for sweep in sweeps:
        sweep.abandon()


@pytest.fixture(scope="session")
def local(new_sweep: Callable[[str], Sweep]) -> Sweep:
    """The same runs on this machine, one after another in one process, without Slurm."""
    sweep = new_sweep("local")
    sweep.send("hydra/sweeper=basic", "seed=0,1,2,3", where="")
    assert sweep.finish() == 0, sweep.everything
    return sweep


@pytest.fixture(scope="session")
def assert_same_rows(local: Sweep) -> Callable[[Sweep, int], None]:
    """Checks that the run of a seed left the same as without Slurm, bit for bit."""

    def check(sweep: Sweep, seed: int) -> None:
        for rows, expected in zip(sweep.rows(seed), local.rows(seed), strict=True):
            pd.testing.assert_frame_equal(rows, expected, check_exact=True)

    return check
