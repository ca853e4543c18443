"""Runs whose spectra are solved beside training, as on a GPU, and late."""

import signal
import time

import pandas as pd
import pytest

import nerve

from nerve.measuring.eigenproblem import FFNEigenproblem
from nerve.storage.record import RunRecord
from nerve.training.signals import Interrupted

EVERY = ("monitor.every_n_steps=1", "monitor.groups=[halves]")


@pytest.fixture
def late(monkeypatch):
    solve = FFNEigenproblem.solve

    def slow(problem):
        time.sleep(0.02)
        return solve(problem)

    monkeypatch.setattr(FFNEigenproblem, "solve", slow)
    monkeypatch.setattr("nerve.recording.recorder.spare_workers", lambda *args: 2)


@pytest.mark.parametrize("source", ["heldout", "train"])
def test_late(experiment, stop_at, go_on, assert_same, late, tmp_path, source):
    how = [*EVERY, f"monitor.source={source}"]
    experiment("whole", *how)
    for index in range(5):
        for cause in (signal.SIGTERM, ValueError("mine")):
            name = f"{index}-{type(cause).__name__}"
            stop_at(index, cause)
            with pytest.raises((Interrupted, ValueError)):
                experiment(name, *how, "checkpoint.every_n_steps=2")
            print(name, RunRecord.load(tmp_path / name).run_status)
            go_on()
            experiment(name, *how, "checkpoint.every_n_steps=2", "retry=true")
            for load in (nerve.load_metrics, nerve.load_spectra, nerve.load_groups, nerve.load_scalars):
                a, b = (by_key(load(tmp_path / each)) for each in ("whole", name))
                pd.testing.assert_frame_equal(a, b, check_exact=True)
            # Measurements come to the loggers when they are solved: in another order.
            a, b = (sorted((tmp_path / each / "logs/metrics.csv").read_text().splitlines()) for each in ("whole", name))
            if a != b: print(name, [x[:30] for x in set(a)-set(b)], [x[:30] for x in set(b)-set(a)])


def by_key(frame):
    frame = frame.drop(columns=["run_id", "run_status"])
    keys = [k for k in ("step","layer","ffn","site","grouping","group","name") if k in frame]
    return frame.sort_values(keys).reset_index(drop=True)
