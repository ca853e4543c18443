"""The CSV file has each row once, however often the run was resumed; wandb has one run for each
run."""

import csv
from pathlib import Path

import pytest

import nerve.training.loggers
from nerve.errors import StoreError
from nerve.storage.record import RunRecord
from nerve.training.loggers import CSVLogger, WandbLogger, wandb_id_in, wandb_id_of


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


def test_rows_are_appended_and_a_new_column_has_the_file_written_anew(tmp_path, monkeypatch):
    """At any time the file has all saved rows; a name with a comma stays one column."""
    anew = []
    write = nerve.training.loggers.write_atomically
    monkeypatch.setattr(
        nerve.training.loggers,
        "write_atomically",
        lambda *args: anew.append(len(anew)) or write(*args),
    )
    logger, logged = CSVLogger(tmp_path), []
    for step in range(6):
        values = {"loss": step / 3} | ({"a,b": 0.5} if step >= 3 else {})
        logger.log_metrics(values, step)
        logger.save()
        logged.append({"step": str(step)} | {name: repr(value) for name, value in values.items()})
        names = {name for row in logged for name in row}
        assert rows(tmp_path) == [dict.fromkeys(names, "") | row for row in logged]
    assert len(anew) == 2
    logger.save()
    assert len(rows(tmp_path)) == 6


def test_a_row_that_was_cut_short_is_dropped_and_a_refused_one_is_not(tmp_path, monkeypatch):
    """One process dies in the middle of a row; for another, the disk is full in the middle of a
    row."""
    first = CSVLogger(tmp_path)
    first.log_metrics({"loss": 0.25}, 0)
    first.save()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "1,0.2")
    second = CSVLogger(tmp_path)
    second.log_metrics({"loss": 0.5}, 1)
    second.save()

    def full(path, *args):
        with open(path, "a") as file:
            file.write("2,0.")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(nerve.training.loggers, "open", full, raising=False)
        second.log_metrics({"loss": 0.75}, 2)
        with pytest.raises(StoreError, match="No space left on device"):
            second.save()
    second.save()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("0", "0.25"),
        ("1", "0.5"),
        ("2", "0.75"),
    ]


@pytest.mark.parametrize("resumed_at", [0, 2, 5])
def test_a_resumed_run_replaces_what_it_logs_again(tmp_path, resumed_at):
    """The first process dies at step 4; the second starts from an earlier or later checkpoint."""
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


def test_a_last_piece_that_has_nothing_to_log_leaves_each_row_once(tmp_path):
    """The previous process logged steps again, saved its last step, and was killed."""
    first = CSVLogger(tmp_path)
    for step in range(3):
        first.log_metrics({"loss": 1.5}, step)
    first.save()
    second = CSVLogger(tmp_path)
    for step in (1, 2):
        second.log_metrics({"loss": 2.5}, step)
        second.save()
    assert len(rows(tmp_path)) == 4
    CSVLogger(tmp_path).finalize("success")
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
        ("0", "1.5"),
        ("1", "2.5"),
        ("2", "2.5"),
    ]


def test_a_directory_that_is_gone_does_not_come_back_with_a_lone_file(tmp_path):
    """Neither when a row is appended nor when the whole file is rewritten."""
    logger = CSVLogger(tmp_path / "run" / "logs")
    logger.log_metrics({"loss": 0.25}, 0)
    logger.save()
    (tmp_path / "run").rename(tmp_path / "moved")
    logger.log_metrics({"loss": 0.5}, 1)
    with pytest.raises(StoreError):
        logger.save()
    with pytest.raises(StoreError, match="logs no longer exists"):
        logger.finalize("failed")
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]


@pytest.mark.parametrize("when", ["new", "resumed"])
def test_what_a_killed_writer_left_is_removed(tmp_path, when):
    """After a full disk or a kill while the file was written, half of it remains under a hidden
    name."""
    if when == "resumed":
        first = CSVLogger(tmp_path)
        first.log_metrics({"loss": 0.25}, 0)
        first.save()
    for token in ("0a1b", "2c3d"):
        (tmp_path / f".metrics.csv.{token}.tmp").write_text("step,lo")
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, 1)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    ("given", "of_record", "expected"),
    [
        ({}, {}, "run1"),
        ({"WANDB_RUN_ID": "agents"}, {}, "agents"),  # of a run that wandb's agent has started
        ({"WANDB_RUN_ID": ""}, {}, "run1"),
        ({"WANDB_RUN_ID": "another"}, {"wandb_id": "agents"}, "agents"),  # resumed elsewhere
        ({}, {"wandb_id": "agents"}, "agents"),
        ({"WANDB_RUN_ID": "agents"}, {"restarts": 1}, "run1"),  # began before ids were recorded
        ({"WANDB_RUN_ID": "agents"}, {"sweep": "normfree"}, "run1"),  # all trials would be one run
    ],
)
def test_the_id_at_wandb_is_the_records_or_that_of_its_environment(
    tmp_path, monkeypatch, given, of_record, expected
):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    record = RunRecord.create(tmp_path, {}, run_id="run1")
    record.update(**of_record)
    assert wandb_id_of(RunRecord.load(tmp_path)) == expected


@pytest.mark.parametrize("sweep", [None, "normfree"])
def test_what_the_environment_names_at_wandb_is_left_to_it(tmp_path, monkeypatch, sweep):
    """wandb reads these variables itself if it is given nothing."""
    given: dict[str, object] = {}
    monkeypatch.setattr(
        "lightning.pytorch.loggers.WandbLogger.__init__",
        lambda self, **values: given.update(values),
    )
    RunRecord.create(tmp_path, {}, run_id="run1", sweep=sweep)
    logger = WandbLogger(tmp_path, project="nerve")
    assert (given["id"], given["name"], given.get("group")) == ("run1", "run1", sweep)
    assert wandb_id_in([CSVLogger(tmp_path), logger]) == "run1"
    for name in ("WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_GROUP"):
        monkeypatch.setenv(name, "mine")
    given.clear()
    logger = WandbLogger(tmp_path, project="nerve")
    assert not given.keys() & {"name", "group"}
    assert given["id"] == wandb_id_in([logger]) == ("run1" if sweep else "mine")
    assert wandb_id_in([CSVLogger(tmp_path)]) is None
