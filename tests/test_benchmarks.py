"""Benchmarks use only the GPUs that they are given, and peers store the same values."""

import argparse
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("named", "expected"),
    [("4,5,6,7", ["4,5", "6,7"]), ("GPU-a, GPU-b", ["GPU-a,GPU-b", ""]), (None, ["0,1", "2,3"])],
)
def test_processes_share_the_gpus_of_the_environment(monkeypatch, named, expected):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
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
def test_peers_load_the_values_of_all_runs(monkeypatch, name):
    """Each in its own columns; TensorBoard has those of float32."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import results
    import trackers

    runs = [results.metrics_of(index, "", 2, 3).to_pandas() for index in range(2)]
    *_, loaded = trackers.store_and_load(trackers.peers()[name], runs)
    found = loaded.drop(columns=[*trackers.KEYS, "run"], errors="ignore").to_numpy(float)
    stored = np.concatenate([run[trackers.NUMBERS].to_numpy(float) for run in runs])
    np.testing.assert_allclose(np.sort(found.ravel()), np.sort(stored.ravel()), rtol=1e-6)
    assert trackers.n_loaded(loaded) == stored.size
