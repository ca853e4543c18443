"""Benchmarks use only the GPUs that they are given."""

import argparse
import subprocess
from pathlib import Path

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
