"""Solved measurements become rows of the run under their own step, and values for loggers."""

import math

import pytest
import torch

from nerve.analysis.load import load_metrics, load_spectra
from nerve.measuring.eigenproblem import FFNSpectra
from nerve.recording.solver import Solved
from nerve.recording.writer import SpectraWriter
from nerve.spectra import Shares
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore


class Numbers:
    """A logger that keeps what it receives."""

    def __init__(self):
        self.logged, self.n_saved = [], 0

    def log_metrics(self, metrics, step=None):
        self.logged.append((step, metrics))

    def save(self):
        self.n_saved += 1


def solved(step: int, d_ff: int = 4, post: float = 1.0) -> Solved:
    shares = Shares(0.0, 0.25, 0.25, 1.0)
    spectrum = torch.ones(d_ff, dtype=torch.float64)
    spectra = FFNSpectra(
        0, "ffn", 10, 4, d_ff, spectrum, spectrum * post, "float64", shares, shares, 0.5
    )
    return Solved({"step": step, "tokens_seen": 0, "val_loss": 1.0}, [spectra])


@pytest.fixture
def run(tmp_path):
    record = RunRecord.create(tmp_path, {})
    return RunStore(tmp_path, record.run_id)


def test_each_measurement_is_stored_and_logged_with_its_own_step(run):
    logger = Numbers()
    writer = SpectraWriter(run, [logger], "auto")
    writer.write(solved(step) for step in (0, 25))
    metrics = load_metrics(run.directory)
    assert metrics["step"].tolist() == [0, 25]
    assert metrics["pr_pre"].tolist() == [4.0, 4.0]
    assert load_spectra(run.directory)["site"].tolist() == ["pre", "post"] * 2
    assert [step for step, _ in logger.logged] == [0, 25]
    assert logger.logged[0][1]["ffn/00/variance_outside"] == 0.5
    assert logger.n_saved == 2
    assert writer.latest[0]["step"] == 25


@pytest.mark.parametrize(
    ("spectra", "d_ff", "n_stored"),
    [
        ("auto", 1024, 2),
        ("auto", 1025, 0),
        (True, 1025, 2),
        (False, 4, 0),
    ],
)
def test_eigenvalues_are_stored_as_configured(run, spectra, d_ff, n_stored):
    SpectraWriter(run, [], spectra).write([solved(0, d_ff)])
    stored = list((run.directory / "spectra").glob("*.parquet"))
    assert len(load_spectra(run.directory)) == n_stored if n_stored else not stored


def test_an_unmeasured_spectrum_has_a_row_with_a_status_and_no_eigenvalues(run):
    SpectraWriter(run, [], True).write([solved(0, post=math.nan)])
    assert load_metrics(run.directory)["status"].tolist() == ["non_finite_post"]
    assert load_spectra(run.directory)["site"].tolist() == ["pre"]


def test_a_process_without_a_store_iterates_over_the_measurements():
    """That is where the processes exchange what they solved."""
    waiting = iter([solved(0), solved(1)])
    writer = SpectraWriter(None, [], "auto")
    writer.write(waiting)
    assert next(waiting, None) is None
    assert writer.latest == []
