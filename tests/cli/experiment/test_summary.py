"""What is printed at the end of a run."""

import pytest

from nerve.cli.experiment.summary import finish
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord


@pytest.mark.parametrize("sweep", [None, "multirun"])
def test_a_run_prints_the_next_commands_and_a_trial_does_not(tmp_path, monkeypatch, capsys, sweep):
    monkeypatch.setattr("nerve.cli.experiment.summary.drop_all_but_weights", lambda path: None)
    record = RunRecord.create(tmp_path / "a b", {}, sweep=sweep)
    final = {"val_loss": 2.5, "train_seconds": 4.0, "measuring_seconds": 1.0}
    finish(RunDirectory(record.directory), record, final, None, [])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "validation loss: 2.500 nats per target",
        "time: 4.0 s, of which measuring and validating 1.0 s (25.0%)",
    ]
    assert [line.partition(":")[0] for line in lines[2:]] == (
        [] if sweep else ["run directory", "report", "in a notebook"]
    )
    assert sweep or lines[3] == f"report: nerve-report '{tmp_path}/a b'"
