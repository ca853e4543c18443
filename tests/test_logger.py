"""The CSV file has each row once, however often the run was resumed."""

import csv
from pathlib import Path

import pytest

from nerve.logger import CSVLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_holds_what_one_call_logged(tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    logger.log_metrics({"train_loss": 1.5, "epoch": 0}, step=3)
    logger.log_metrics({"val_loss": 0.1, "step": 3.0}, step=3)
    assert not (tmp_path / "logs").exists()
    logger.finalize("success")
    assert rows(tmp_path / "logs") == [
        {"step": "3", "epoch": "0.0", "train_loss": "1.5", "val_loss": ""},
        {"step": "3", "epoch": "", "train_loss": "", "val_loss": "0.1"},
    ]


def test_rows_are_written_when_so_many_wait(tmp_path):
    logger = CSVLogger(tmp_path, every_n_rows=2)
    for step in range(5):
        logger.log_metrics({"loss": step}, step)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("resumed_at", [0, 2, 5])
def test_a_resumed_run_replaces_what_it_logs_again(tmp_path, resumed_at):
    """The first piece dies at step 4, the second starts from a checkpoint before or after."""
    first = CSVLogger(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": 1 / (step + 1)}, step)
    first.save()
    second = CSVLogger(tmp_path)
    for step in range(resumed_at, 8):
        second.log_metrics({"loss": 1 / (step + 1)}, step)
    second.finalize("success")
    assert [(row["step"], float(row["loss"])) for row in rows(tmp_path)] == [
        (str(step), 1 / (step + 1)) for step in range(8)
    ]
