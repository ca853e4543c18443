"""Benchmarks fit nerve as it is, use only the GPUs that they are given, and compare with what they
say, which is given the same values."""

import argparse
import ast
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("named", "expected"),
    [("4,5,6,7", ["4,5", "6,7"]), ("GPU-a, GPU-b", ["GPU-a,GPU-b", ""]), (None, ["0,1", "2,3"])],
)
def test_processes_share_the_gpus_of_the_environment(benchmarks, monkeypatch, named, expected):
    import stalls

    monkeypatch.setattr(stalls.torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    given = []
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: given.append(env))
    for place in range(2):
        stalls.started(argparse.Namespace(devices=2), place)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in given] == expected


@pytest.mark.parametrize("name", ["nerve", "CSV, pandas", "TensorBoard"])
def test_peers_load_the_values_of_all_runs(benchmarks, name):
    """Each in its own columns; TensorBoard has those of float32."""
    import results
    import trackers

    runs = [results.metrics_of(index, "", 2, 3).to_pandas() for index in range(2)]
    *_, loaded = trackers.store_and_load(trackers.peers()[name], runs)
    found = loaded.drop(columns=[*trackers.KEYS, "run"], errors="ignore").to_numpy(float)
    stored = np.concatenate([run[trackers.NUMBERS].to_numpy(float) for run in runs])
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(stored.ravel()), rtol=1e-6)
    assert trackers.n_loaded(loaded) == stored.size


def test_at_the_floor_gpu_and_cores_end_together(benchmarks):
    """The cores solve a share of the spectra all the while, the GPU the rest after training."""
    from sharing import floor_s

    floor = floor_s(training_s=21.2, device_s=24.0, host_s=1200.0, n_cores=16)
    share_of_cores = 16 * floor / 1200
    assert 21.2 + (1 - share_of_cores) * 24 == pytest.approx(floor)
    assert 21.2 < floor < 21.2 + 24


def test_the_floor_is_training_where_the_cores_solve_everything_meanwhile(benchmarks):
    from sharing import floor_s

    assert floor_s(training_s=21.2, device_s=24.0, host_s=16 * 21.2, n_cores=16) == pytest.approx(
        21.2
    )
    assert floor_s(training_s=21.2, device_s=24.0, host_s=16 * 10.0, n_cores=16) == 21.2


@pytest.mark.parametrize(
    ("shortcut", "precision", "expected"),
    [
        (True, "bf16-mixed", 2),
        ("projected", "bf16-mixed", 1),
        ("projected", "32-true", 1),
        (True, "32-true", 1),
        (False, "32-true", 2),
        (False, "bf16-mixed", 2),
    ],
)
def test_pre_counts_in_the_floor_unless_the_shortcut_computes_it(
    benchmarks, shortcut, precision, expected
):
    from sharing import matrices_per_layer

    config = {"monitor": {"shortcut": shortcut}, "trainer": {"precision": precision}}
    assert matrices_per_layer(config) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_everything_that_a_script_takes_from_nerve_exists(path):
    """Some is private to a module, and scripts run seldom."""
    missing = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "nerve"
        for alias in node.names
        if not exists(node.module, alias.name)
    ]
    assert not missing


def exists(module: str, name: str) -> bool:
    owner = import_module(module)
    is_package = hasattr(owner, "__path__")
    return hasattr(owner, name) or (is_package and find_spec(f"{module}.{name}") is not None)
