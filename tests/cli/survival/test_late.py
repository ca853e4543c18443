"""Runs whose spectra are solved in the background, as on a GPU, and late."""

import signal
import time

import pandas as pd
import pytest

import nerve
from nerve.measuring.eigenproblem import FFNEigenproblem
from nerve.training.signals import Interrupted

KEY = ["step", "layer", "ffn", "site", "grouping", "group"]


@pytest.fixture
def late(monkeypatch):
    solve = FFNEigenproblem.solve

    def slow(problem):
        time.sleep(0.02)
        return solve(problem)

    monkeypatch.setattr(FFNEigenproblem, "solve", slow)
    monkeypatch.setattr("nerve.recording.pipeline.spare_workers", lambda *args: 2)


@pytest.mark.parametrize(
    ("source", "cause", "measured"),
    [("heldout", signal.SIGTERM, [0, 1, 2, 3, 4]), ("train", ValueError("mine"), [0, 1, 2])],
)
def test_late_spectra_are_stored_when_a_run_is_interrupted_and_after_it_resumed(
    experiment, stop_at, go_on, late, tmp_path, source, cause, measured
):
    """Interrupted in step 4, with a checkpoint of step 2; loggers get late results, too."""
    how = ["monitor.every_n_steps=1", "monitor.groups=[halves]", f"monitor.source={source}"]
    how += ["checkpoint.every_n_steps=2", "retry=true"]
    experiment("whole", *how)
    stop_at(3, cause)
    with pytest.raises((Interrupted, ValueError)):
        experiment("pieces", *how)
    assert sorted(set(nerve.load_metrics(tmp_path / "pieces")["step"])) == measured
    go_on()
    experiment("pieces", *how)
    for load in (nerve.load_metrics, nerve.load_spectra, nerve.load_groups):
        whole, pieces = (rows(load(tmp_path / name)) for name in ("whole", "pieces"))
        pd.testing.assert_frame_equal(whole, pieces, check_exact=True)
    logs = (tmp_path / name / "logs" / "metrics.csv" for name in ("whole", "pieces"))
    whole, pieces = (sorted(log.read_text().splitlines()) for log in logs)
    assert whole == pieces


def rows(frame: pd.DataFrame) -> pd.DataFrame:
    frame = frame.drop(columns=["run_id", "run_status"])
    return frame.sort_values([name for name in KEY if name in frame]).reset_index(drop=True)
