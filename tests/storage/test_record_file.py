"""run.json is complete or absent, of its own run, and verified when it is read."""

import json
import shutil
import zlib

import numpy as np
import pytest

from nerve.errors import StoreError
from nerve.storage.record import RunRecord
from nerve.storage.record_file import DamagedRecordError

CONFIG = {"seed": 3, "ffn": {"width": "8/3"}, "note": "two\nlines <b> \ud800"}


def test_the_file_is_strict_json(tmp_path):
    """NaN and infinity, NumPy numbers, paths and tuples are converted to JSON."""
    record = RunRecord.create(tmp_path, {"lr": np.float32(0.5), "betas": (0.9, float("inf"))})
    record.update(final={"val_loss": float("nan"), "accuracy": np.float64(0.5)}, step=np.int64(7))

    def refuse(name: str) -> None:
        raise AssertionError(name)

    values = json.loads((tmp_path / "run.json").read_text(), parse_constant=refuse)
    assert values["final"] == {"val_loss": None, "accuracy": 0.5}
    assert values["step"] == 7
    assert values["config"] == {"lr": 0.5, "betas": [0.9, {"float": "inf"}]}
    assert "directory" not in values


def test_every_truncation_of_the_file_is_named(tmp_path):
    """Wherever the file is cut, the error names it; a truncated record is never taken for a
    complete one."""
    RunRecord.create(tmp_path, CONFIG)
    path = tmp_path / "run.json"
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedRecordError, match=r"run\.json"):
            RunRecord.load(tmp_path)


@pytest.mark.parametrize("mask", [0x01, 0x04])
def test_a_changed_byte_anywhere_is_harmless_or_named(tmp_path, mask):
    """Without a checksum, a changed digit, letter or key would silently be another value."""
    record = RunRecord.create(tmp_path, {"optimizer": {"lr": 0.003}, "seed": 3}, seed=3)
    record.finish("done", final={"val_loss": 4.25}, step=40)
    path = tmp_path / "run.json"
    content, n_changed, n_named, n_silent = path.read_bytes(), 0, 0, 0
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= mask
        path.write_bytes(changed)
        try:
            assert RunRecord.load(tmp_path) == record, place
        except StoreError as error:
            n_named += str(path) in str(error)
            n_silent += reads_otherwise(changed, content)
        n_changed += 1
    assert n_named > n_changed / 2
    assert n_silent > len(content) / 12


def reads_otherwise(changed: bytes, content: bytes) -> bool:
    """Whether the JSON parser alone accepts it."""
    try:
        return json.loads(changed) != json.loads(content)
    except ValueError:
        return False


def test_a_record_that_is_edited_on_purpose_reads_without_its_checksum(tmp_path):
    RunRecord.create(tmp_path, CONFIG)
    path = tmp_path / "run.json"
    edited = json.loads(path.read_text()) | {"run_status": "done"}
    path.write_text(json.dumps(edited))
    with pytest.raises(DamagedRecordError, match="delete the line with the checksum"):
        RunRecord.load(tmp_path)
    del edited["checksum"]
    path.write_text(json.dumps(edited))
    assert RunRecord.load(tmp_path).run_status == "done"


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": "one"}',
        '{"schema_version": 1, "run_id": "a", "config_id": "b", "config": [], "run_status": "done",'
        ' "started": "", "heartbeat": ""}',
        '{"schema_version": 1, "run_id": "a", "config_id": "b", "config": {}, "run_status": "?",'
        ' "started": "", "heartbeat": ""}',
        "\x00\xff",
    ],
)
def test_what_is_not_a_record_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedRecordError, match=r"run\.json"):
        RunRecord.load(tmp_path)


def test_a_record_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(DamagedRecordError, match=r"run\.json"):
        RunRecord.load(tmp_path)


def test_a_newer_record_is_not_guessed_at(tmp_path):
    RunRecord.create(tmp_path, CONFIG)
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StoreError, match="newer"):
        RunRecord.load(tmp_path)


def test_no_record_is_named(tmp_path):
    with pytest.raises(StoreError, match=r"has none\. Pass the directory of a run"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize("change", ["renamed", "deleted", "deleted with what is above it"])
@pytest.mark.parametrize(
    "write",
    [
        lambda record: record.update(step=9),
        lambda record: record.restart(),
        lambda record: record.finish("failed", ValueError("x")),
    ],
)
def test_a_directory_that_is_gone_does_not_come_back_with_a_lone_record(tmp_path, change, write):
    directory = tmp_path / "sweep" / "run"
    record = RunRecord.create(directory, CONFIG)
    if change == "renamed":
        directory.rename(tmp_path / "sweep" / "other")
    else:
        shutil.rmtree(directory if change == "deleted" else directory.parent)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"sweep/run no longer exists: it was renamed or del"):
        write(record)
    assert sorted(tmp_path.rglob("*")) == before
    assert record.step == 0


def test_another_run_that_was_put_in_the_place_of_one_is_not_written_over(tmp_path):
    record = RunRecord.create(tmp_path / "run", CONFIG, "mine")
    (tmp_path / "run").rename(tmp_path / "moved")
    RunRecord.create(tmp_path / "run", {"seed": 4}, "its")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(StoreError, match="now belongs to run its and no longer to run mine"):
        record.update(step=9)
    assert (tmp_path / "run" / "run.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_a_record_that_is_lost_while_its_run_works_is_written_anew(tmp_path, content):
    record = RunRecord.create(tmp_path, CONFIG)
    if content is None:
        (tmp_path / "run.json").unlink()
    else:
        (tmp_path / "run.json").write_bytes(content)
    record.update(step=9)
    assert RunRecord.load(tmp_path) == record


@pytest.mark.parametrize(
    "more", [{}, {"author": "me"}, {"zone": 1}, {"author": "me", "zone": [1]}], ids=str
)
def test_the_checksum_is_that_of_the_sorted_json_whatever_is_beside_the_configuration(
    tmp_path, more
):
    """Also of keys that a later version may add; each change of a value is noticed."""
    RunRecord.create(tmp_path, {"b": {"y": 1.0, "x": "ü"}, "a": [1, None], "seed": 3})
    path = tmp_path / "run.json"
    values = json.loads(path.read_text()) | more
    del values["checksum"]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    values["checksum"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(values))
    assert RunRecord.load(tmp_path).config["b"] == {"y": 1.0, "x": "ü"}
    for change in ({"step": 1}, *({name: 7} for name in more)):
        path.write_text(json.dumps(values | change))
        with pytest.raises(DamagedRecordError, match="checksum does not match"):
            RunRecord.load(tmp_path)
    for config in ({"y": 1, "x": "ü"}, {"y": True, "x": "ü"}, {"x": "ü"}):
        path.write_text(json.dumps(values | {"config": {**values["config"], "b": config}}))
        with pytest.raises(DamagedRecordError, match="checksum does not match"):
            RunRecord.load(tmp_path)
