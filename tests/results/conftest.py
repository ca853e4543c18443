"""Rows and runs for the tests of nerve.results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nerve.results import RunRecord, RunStore

CONFIG = {
    "normalization": {"kind": "layernorm", "placement": "pre"},
    "activation": {"name": "gelu"},
    "ffn": {"width": "8/3", "gated": False},
    "optimizer": {"lr": 0.003, "betas": [0.9, 0.95]},
    "seed": 7,
}


def metrics_row(step: int, layer: int = 0, **values: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "tokens_seen": step * 64,
        "layer": layer,
        "ffn": "ffn",
        "n_samples": 100,
        "d_ff": 8,
        "d_in": 4,
        "se_pre": 1.0,
        "se_post": 1.5,
        "pr_pre": 2.0,
        "pr_post": 5.0,
        "eee_pre": 0.75,
        "eee_post": 0.25,
        "js": 0.125,
        "variance_pre": 3.0,
        "variance_post": 1.0,
        "pr_pre_corrected": 2.0625,
        "pr_post_corrected": 5.25,
        "train_loss": 4.0,
        "val_loss": 4.5,
        "lr": 0.003,
        "precision": "float32",
        "status": "ok",
    }
    return row | values


@pytest.fixture
def row() -> Callable[..., dict[str, Any]]:
    """A whole row of metrics at a step."""
    return metrics_row


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    """A store with nothing in it."""
    return RunStore(tmp_path / "run", "cafe0001")


@pytest.fixture
def make_run() -> Callable[..., RunRecord]:
    """Makes a run directory with two steps of metrics, two layers each."""

    def make(
        directory: Path,
        config: dict[str, Any] | None = None,
        steps: tuple[int, ...] = (0, 10),
        **values: Any,
    ) -> RunRecord:
        record = RunRecord.create(directory, config or CONFIG, **values)
        store = RunStore(directory, record.run_id)
        for step in steps:
            store.append_metrics(metrics_row(step, layer) for layer in range(2))
            store.append_scalars([{"step": step, "name": "train_loss", "value": 4.0 - step / 10}])
            store.flush(step)
        return record

    return make
