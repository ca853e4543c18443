"""A record contains what the run recorded, each value of its type."""

import json
import math
import os
import platform
from dataclasses import fields
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from nerve.errors import StoreError
from nerve.storage.identity import config_id, differences, ids_of_plain
from nerve.storage.record import RunRecord
from nerve.storage.record_fields import KINDS
from nerve.storage.record_file import DamagedRecordError

CONFIG = {"seed": 3, "ffn": {"width": "8/3"}, "note": "two\nlines <script>alert(1)</script> \ud800"}


def test_round_trip(tmp_path):
    """Every field is restored, even hostile text in the configuration."""
    record = RunRecord.create(
        tmp_path / "run",
        CONFIG,
        run_id="cafe0001",
        sweep="normfree",
        seed=3,
        n_parameters=1000,
        fingerprints={"corpus": "c", "tokenizer": "t", "heldout": "h"},
        device="cpu",
        job={"id": "12_3"},
        unigram_loss=5.5,
        pre_scales={"ffn/00": 1.5},
        versions={"cuda": "12.8"},
    )
    record.update(step=40, final={"val_loss": 4.25})
    loaded = RunRecord.load(tmp_path / "run")
    assert loaded == record
    assert loaded.config == CONFIG
    assert loaded.config_id == config_id(CONFIG)
    assert (loaded.run_id, loaded.run_status, loaded.restarts) == ("cafe0001", "running", 0)
    assert loaded.versions["python"] == platform.python_version()
    assert loaded.versions["cuda"] == "12.8"
    assert datetime.now(UTC) - datetime.fromisoformat(loaded.heartbeat) < timedelta(minutes=1)


def test_each_run_has_an_id_of_its_own(tmp_path):
    ids = {RunRecord.create(tmp_path / str(i), CONFIG).run_id for i in range(3)}
    assert len(ids) == 3


def test_an_infinite_value_has_one_id_in_the_process_and_in_the_file(tmp_path):
    config = {"clip": float("inf"), "lr": np.float32(0.1), "betas": (0.9, float("-inf"))}
    record = RunRecord.create(tmp_path, config)
    loaded = RunRecord.load(tmp_path)
    assert loaded.config == {
        "clip": math.inf,
        "lr": float(np.float32(0.1)),
        "betas": [0.9, -math.inf],
    }
    assert loaded.config_id == record.config_id == config_id(config)
    assert differences(loaded.config, config) == []


def test_the_id_is_that_of_the_configuration_whatever_an_earlier_version_called_it(tmp_path):
    """Also if it wrote none, or wrote null for an infinite value, which stays null."""
    record = RunRecord.create(tmp_path, {"clip": None, "_target_": "once.here.Thing"})
    path = tmp_path / "run.json"
    values = json.loads(path.read_text()) | {"checksum": None}
    without = {name: value for name, value in values.items() if name != "config_id"}
    for stored in ({**values, "config_id": "0123456789ab"}, without):
        path.write_text(json.dumps(stored))
        loaded = RunRecord.load(tmp_path)
        assert loaded.config_id == record.config_id
        assert loaded.config_id == config_id({"clip": None, "_target_": "now.there.Thing"})
    assert differences(loaded.config, {"clip": math.inf, "_target_": "Thing"}) == ["clip"]
    loaded.update(step=1)
    assert json.loads(path.read_text())["config_id"] == record.config_id


def test_finish_and_restart(tmp_path):
    """A failed run says why and when; restarting it keeps its id and counts the restart."""
    record = RunRecord.create(tmp_path, CONFIG)
    record.finish("failed", ValueError("no such <thing>"), step=5)
    failed = RunRecord.load(tmp_path)
    assert failed.run_status == "failed"
    assert failed.error == {"type": "ValueError", "message": "no such <thing>"}
    assert failed.ended is not None
    failed.restart(job={"id": "2"})
    again = RunRecord.load(tmp_path)
    assert (again.run_status, again.error, again.ended) == ("running", None, None)
    assert (again.restarts, again.run_id, again.step) == (1, record.run_id, 5)
    assert (again.started, again.job) == (record.started, {"id": "2"})
    again.finish("done")
    assert RunRecord.load(tmp_path).error is None


def test_a_changed_configuration_changes_its_id(tmp_path):
    record = RunRecord.create(tmp_path, CONFIG)
    record.restart(config={**CONFIG, "max_steps": 10})
    assert RunRecord.load(tmp_path).config_id == config_id({**CONFIG, "max_steps": 10})


def test_a_second_run_in_a_directory_is_refused(tmp_path):
    first = RunRecord.create(tmp_path, CONFIG)
    with pytest.raises(StoreError, match="Resume that run"):
        RunRecord.create(tmp_path, CONFIG)
    assert RunRecord.load(tmp_path) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"stepp": 1},
        {"run_id": "other"},
        {"run_status": "finished"},
        {"final": 3.0},
        {"final": {"val_loss": "low"}},
        {"error": "x"},
        {"error": {"type": "ValueError", "message": None}},
        {"error": {}},
        {"job": 7},
        {"job": "7"},
        {"heartbeat": "2026-01-01T00:00:00"},
        {"heartbeat": "today"},
        {"heartbeat": 1.5e9},
        {"ended": "2026-01-01"},
        {"seed": "3"},
        {"restarts": None},
        {"restarts": True},
        {"n_parameters": 1.5},
        {"unigram_loss": "5"},
        {"host": 3},
        {"device": ["cpu"]},
        {"config": None},
        {"versions": ["torch"]},
    ],
    ids=str,
)
def test_a_wrong_update_changes_nothing(tmp_path, changes):
    record = RunRecord.create(tmp_path, CONFIG)
    before = dict(vars(record))
    with pytest.raises(StoreError, match=next(iter(changes))):
        record.update(step=9, **changes)
    assert vars(record) == before
    assert RunRecord.load(tmp_path) == record


@pytest.mark.parametrize("step", [None, "9", 9.5, True, [9]])
def test_a_step_is_a_whole_number(tmp_path, step):
    record = RunRecord.create(tmp_path, CONFIG)
    with pytest.raises(StoreError, match="step of a run record must be a whole number"):
        record.update(step=step)
    assert RunRecord.load(tmp_path) == record


@pytest.mark.parametrize("where", ["os.replace", "os.fsync"])
def test_a_refused_write_leaves_the_old_record(tmp_path, monkeypatch, where):
    record = RunRecord.create(tmp_path, CONFIG)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(where, refuse)
        with pytest.raises(StoreError, match=r"run\.json cannot be written"):
            record.update(step=9)
    assert record.step == 0
    assert RunRecord.load(tmp_path) == record
    assert os.listdir(tmp_path) == ["run.json"]
    record.update(step=9)
    assert RunRecord.load(tmp_path).step == 9


@pytest.mark.parametrize(
    "values",
    [
        {"heartbeat": "2026-01-01T00:00:00"},
        {"heartbeat": None},
        {"started": 5},
        {"ended": []},
        {"error": "x"},
        {"error": {"type": 1, "message": 2}},
        {"final": []},
        {"final": {"val_loss": "1.5"}},
        {"step": "40"},
        {"step": None},
        {"step": 1e400},
        {"restarts": {}},
        {"run_id": None},
        {"run_id": ["a"]},
        {"run_status": ["done"]},
        {"run_status": {"done": 1}},
        {"job": "7"},
        {"host": 7},
        {"warning": 7},
        {"stopped_by": ["a"]},
        {"separator_token": {}},
        {"config": "lr"},
        {"fingerprints": None},
        {"schema_version": 1e400},
        {"schema_version": None},
    ],
    ids=str,
)
def test_a_record_with_a_value_of_another_type_is_named(tmp_path, values):
    """For every field, because records are displayed, sorted and counted elsewhere."""
    RunRecord.create(tmp_path, CONFIG)
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values | {"checksum": None}))
    with pytest.raises(DamagedRecordError, match=r"run\.json"):
        RunRecord.load(tmp_path)


def test_every_field_of_the_file_has_a_type():
    """Except `config_id`, which is computed anew."""
    checked = [name for _, _, names in KINDS for name in names]
    own = {"directory", "config_id", "design_id"}
    assert sorted(checked) == sorted({each.name for each in fields(RunRecord)} - own)


def test_last_steps_of_another_type_are_none(tmp_path):
    for steps in ("400", None, [1]):
        record = RunRecord.create(tmp_path / str(steps), {"trainer": {"max_steps": steps}})
        assert (record.max_steps, record.progress) == (None, "0")


def test_an_update_of_the_configuration_updates_both_ids(tmp_path):
    """That without the seed is in no file."""
    record = RunRecord.create(tmp_path, {"a": 1, "seed": 1})
    record.update(config={"a": 2, "seed": 1})
    assert (record.config_id, record.design_id) == ids_of_plain({"a": 2, "seed": 1})
    assert RunRecord.load(tmp_path).design_id == record.design_id
    assert "design_id" not in json.loads((tmp_path / "run.json").read_text())
