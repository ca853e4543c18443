"""Runs are found wherever the path points above them, each once, and oddities are named."""

import errno
import json
import os
import shutil

import pytest

from nerve.errors import StoreError
from nerve.storage.find import (
    FingerprintWarning,
    IncompleteWarning,
    find_runs,
    load_records,
)
from nerve.storage.parts import read_parts
from nerve.storage.record import RunRecord
from nerve.storage.record_file import DamagedRecordWarning
from nerve.storage.schema import DATASETS


@pytest.fixture
def tree(tmp_path, make_run):
    """Two sweeps of two trials each and a single run."""
    for name in ("sweep_a/c1", "sweep_a/c2", "sweep_b/c1", "sweep_b/c2", "single"):
        make_run(tmp_path / name, steps=())
    return tmp_path


def test_a_run_a_sweep_and_a_tree(tree):
    assert find_runs(tree / "single") == [tree / "single"]
    assert find_runs(str(tree / "sweep_a")) == [tree / "sweep_a" / "c1", tree / "sweep_a" / "c2"]
    assert len(find_runs(tree)) == 5


def test_several_paths_count_a_run_once(tree):
    assert find_runs([tree / "sweep_a", tree / "sweep_a" / "c1", tree / "single"]) == [
        tree / "sweep_a" / "c1",
        tree / "sweep_a" / "c2",
        tree / "single",
    ]


def test_links_are_followed_and_their_loops_end(tree, tmp_path):
    (tree / "sweep_a" / "up").symlink_to(tree)
    (tree / "again").symlink_to(tree / "sweep_b")
    (tree / "dangling").symlink_to(tree / "nowhere")
    assert len(find_runs(tree)) == 5
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "all").symlink_to(tree / "sweep_b")
    assert len(find_runs(outside)) == 2


def test_runs_within_runs_are_found(tree, make_run):
    """Directly in the run's directory, in a user's folder in it, and nested."""
    inner = [
        tree / "single" / "a",
        tree / "single" / "a" / "b",
        tree / "sweep_a" / "c1" / "x" / "y",
    ]
    for path in inner:
        make_run(path, steps=())
    assert set(inner) <= set(find_runs(tree))
    assert len(find_runs(tree)) == len(load_records(tree)) == 8
    assert find_runs(tree / "single") == [tree / "single", *inner[:2]]


def test_hidden_directories_and_insides_of_runs_are_passed_over(tree):
    shutil.copytree(tree / "single", tree / ".trash" / "single")
    shutil.copytree(tree / "single", tree / "single" / "checkpoints" / "copy")
    assert len(find_runs(tree)) == 5


def test_no_runs_are_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"run\.json; none was found under .*empty"):
        find_runs(tmp_path / "empty")
    with pytest.raises(StoreError, match=r"there is none at .*missing"):
        find_runs(tmp_path / "missing")
    with pytest.raises(StoreError, match="none was found under no path"):
        find_runs([])


def test_a_damaged_record_is_left_out_and_named(tree):
    (tree / "single" / "run.json").write_text("{")
    with pytest.warns(DamagedRecordWarning, match="single"):
        assert len(load_records(tree)) == 4
    with (
        pytest.warns(DamagedRecordWarning),
        pytest.raises(StoreError, match="None of the 1 runs"),
    ):
        load_records(tree / "single")


def test_a_run_whose_record_is_gone_is_named(tree, make_run):
    lost = make_run(tree / "sweep_a" / "lost").directory
    (lost / "run.json").unlink()
    assert lost in find_runs(tree)
    with pytest.warns(DamagedRecordWarning, match=r"sweep_a/lost/run\.json is missing"):
        assert len(load_records(tree)) == 5


@pytest.mark.parametrize("further", ["original", "copy"])
def test_of_a_run_in_two_directories_the_further_one_counts(tree, further):
    shutil.copytree(tree / "sweep_a", tree / "copy_of_a")
    where = tree / ("sweep_a" if further == "original" else "copy_of_a") / "c1"
    RunRecord.load(where).update(step=100)
    with pytest.warns(IncompleteWarning) as caught:
        records = load_records(tree)
    assert len(records) == 5
    assert where in [record.directory for record in records]
    assert len(caught) == 2
    text = next(str(w.message) for w in caught if f"{where} is used" in str(w.message))
    assert str(tree / "sweep_a" / "c1") in text
    assert str(tree / "copy_of_a" / "c1") in text


def test_a_copy_is_told_from_another_run_of_the_same_id(tree, make_run):
    """A copy has the start time of its original; two runs to which a caller gave the same id do
    not."""
    shutil.copytree(tree / "single", tree / "copy")
    with pytest.warns(IncompleteWarning, match=r"\(copies of one run\).*Move one of them away"):
        load_records(tree)
    record = RunRecord.load(tree / "copy")
    (tree / "copy" / "run.json").unlink()
    make_run(tree / "other", steps=(), run_id=record.run_id)
    path = tree / "other" / "run.json"
    started = f"1999{record.started[4:]}"
    changed = {"started": started, "checksum": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.warns(IncompleteWarning, match=r"\(two runs of one id\)"):
        load_records(tree)


def test_a_record_of_a_newer_nerve_is_left_out_and_named(tree):
    path = tree / "single" / "run.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.warns(IncompleteWarning, match=r"Left out: .*single.* has version 2"):
        assert len(load_records(tree)) == 4


def test_differing_fingerprints_are_named(tmp_path, make_run):
    """One warning per fingerprint that differs, with the runs; a missing fingerprint is no
    difference."""
    same = {"tokenizer": "t", "heldout": "h"}
    ids = [
        make_run(tmp_path / str(i), steps=(), fingerprints=fingerprints).run_id
        for i, fingerprints in enumerate(
            [{"corpus": "py311", **same}, {"corpus": "py312", **same}, {"corpus": "py312"}, {}]
        )
    ]
    with pytest.warns(FingerprintWarning) as caught:
        load_records(tmp_path)
    (warning,) = caught
    assert f"fingerprints.corpus, so their losses are not comparable (py311: {ids[0]}; " in str(
        warning.message
    )
    assert f"py312: {ids[1]}, {ids[2]})" in str(warning.message)
    load_records([tmp_path / "1", tmp_path / "2", tmp_path / "3"])
    make_run(tmp_path / "wide", steps=(), fingerprints={**same, "corpus": "py311", "heldout": "w"})
    with pytest.warns(FingerprintWarning, match=r"differ in width need one monitor\.n_tokens\.$"):
        load_records([tmp_path / "0", tmp_path / "wide"])


def test_a_link_to_itself_is_named(tree):
    """Next to runs, in place of a run, and in place of a sweep."""
    for path in (tree / "self", tree / "sweep_a" / "self"):
        path.symlink_to(path)
    with pytest.warns(IncompleteWarning, match=r"self cannot be followed: .*links") as caught:
        assert len(find_runs(tree)) == 5
    assert len(caught) == 2
    with pytest.raises(StoreError, match="there is none at"):
        find_runs(tree / "self")


@pytest.mark.parametrize("code", ["ENOENT", "ENOTDIR", "ESTALE", "EIO", "EACCES"])
@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_a_directory_that_vanishes_while_the_tree_is_listed_is_named(tree, monkeypatch, code, call):
    """Or that its server no longer finds or can read."""
    real = getattr(os, call)

    def refused(path, *args, **kwargs):
        if str(path).endswith("sweep_a/c2"):
            raise OSError(getattr(errno, code), code, str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, call, refused)
    with pytest.warns(IncompleteWarning, match=r"Left out: .*sweep_a/c2 cannot be listed"):
        assert len(find_runs(tree)) == 4


def test_names_that_are_no_text_keep_nothing_from_being_read(tree, make_run):
    """Names that are not UTF-8: of a file next to runs, of a run, and of a folder above one."""
    odd = os.fsdecode(b"caf\xe9")
    (tree / odd).write_text("")
    (tree / "sweep_a" / "c1" / odd).write_text("")
    for path in (tree / "sweep_a" / odd, tree / f"{odd}s" / "run"):
        make_run(path)
    assert len(load_records(tree)) == 7
    for path in (tree / "sweep_a" / odd, tree / f"{odd}s" / "run"):
        table, damaged = read_parts(path, DATASETS["metrics"])
        assert (len(table), damaged) == (4, [])


def test_a_directory_that_cannot_be_listed_is_named(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith("sweep_b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(IncompleteWarning, match="sweep_b"):
        assert len(find_runs(tree)) == 3
