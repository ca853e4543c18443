"""The writer: flushed rows are there, complete and once, whatever happens in between."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from nerve.errors import StoreError
from nerve.metric_names import GROUPED, STORED
from nerve.storage.manifest import read_manifest
from nerve.storage.parts import DamagedPartWarning, part_path, read_parts, write_part
from nerve.storage.schema import DATASETS, METRICS_SCHEMA
from nerve.storage.store import RunStore


def rows_of(directory: Path, dataset: str = "metrics") -> list[dict]:
    """What a reader sees, in the order of the key."""
    table, damaged = read_parts(directory, DATASETS[dataset])
    assert not damaged
    return table.sort_by([(name, "ascending") for name in DATASETS[dataset].key]).to_pylist()


def names(store: RunStore, dataset: str = "metrics") -> list[str]:
    return sorted(os.listdir(store.directory / dataset))


def fill(store: RunStore, row, steps=(0, 10, 20, 30)) -> None:
    for step in steps:
        store.append_metrics(row(step, layer) for layer in range(2))
        store.flush(step)


def test_round_trip_of_all_three_datasets(store, row):
    """Values, types and schema are restored, using plain pyarrow."""
    store.append_metrics([row(3, se_pre=float("nan"))])
    spectrum = {"step": 3, "layer": 0, "ffn": "ffn", "site": "post", "eigenvalues": [2.5, 0.5]}
    store.append_spectra([spectrum])
    store.append_scalars([{"step": 3, "name": "loss/<script>\n", "value": 0.1}])
    store.flush(3)
    part = pq.read_table(store.directory / "metrics" / "part-000000000003.parquet")
    assert part.schema.equals(METRICS_SCHEMA, check_metadata=True)
    assert part.to_pylist() == [row(3, se_pre=None, run_id="cafe0001")]
    assert rows_of(store.directory, "spectra") == [{"run_id": "cafe0001", **spectrum}]
    assert rows_of(store.directory, "scalars") == [
        {"run_id": "cafe0001", "step": 3, "name": "loss/<script>\n", "value": 0.1}
    ]


@pytest.mark.parametrize(
    ("dataset", "plain", "lists"),
    [
        ("metrics", {*STORED}, set()),
        ("groups", {*GROUPED}, set()),
        ("spectra", set(), {"eigenvalues.list.element"}),
        ("scalars", set(), set()),
    ],
)
def test_what_repeats_in_a_column_is_compressed(tmp_path, dataset, plain, lists):
    """Compression would not make measured numbers smaller; a codec that creates a context for each
    column is only used for long columns."""
    write_part(tmp_path / "part", DATASETS[dataset].schema.empty_table())
    group = pq.read_metadata(tmp_path / "part").row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    codecs = dict.fromkeys(plain, "UNCOMPRESSED") | dict.fromkeys(lists, "ZSTD")
    assert {each.path_in_schema: each.compression for each in columns} == {
        each.path_in_schema: codecs.get(each.path_in_schema, "LZ4") for each in columns
    }


def test_pandas_reads_the_folder_as_it_is(store, row):
    """Also next to the temporary file of a writer that is active or was killed."""
    fill(store, row)
    (store.directory / "metrics" / ".part-000000000040.parquet.0a1b.tmp").write_bytes(b"PAR1half")
    frame = pd.read_parquet(store.directory / "metrics")
    assert len(frame) == 8
    assert list(frame.columns) == METRICS_SCHEMA.names


def test_nothing_waiting_writes_nothing(store):
    store.append_metrics([])
    store.flush(5)
    assert names(store) == []


def test_a_bad_row_takes_none_of_its_batch(store, row):
    with pytest.raises(StoreError, match="nonsense"):
        store.append_metrics([row(1), row(1, 1, nonsense=2)])
    store.flush(1)
    assert names(store) == []


def test_flushing_a_step_twice_keeps_both_and_prefers_the_newer(store, row):
    store.append_metrics([row(5, 0), row(5, 1, se_pre=1.0)])
    store.flush(5)
    store.append_metrics([row(5, 1, se_pre=2.0), row(5, 2)])
    store.flush(5)
    assert names(store) == ["part-000000000005.parquet"]
    stored = rows_of(store.directory)
    assert [(r["layer"], r["se_pre"]) for r in stored] == [(0, 1.0), (1, 2.0), (2, 1.0)]


def test_late_rows_do_not_go_before_the_last_part(store, row):
    """A row measured again wins, because no part before the last is ever written."""
    fill(store, row, steps=(10, 20))
    store.compact()
    store.append_metrics([row(10, 0, se_pre=9.0)])
    store.flush(10)
    assert names(store) == ["part-000000000020.parquet"]
    assert [r["se_pre"] for r in rows_of(store.directory)] == [9.0, 1.0, 1.0, 1.0]


def test_rows_past_the_flushed_step_name_the_part(store, row):
    """So that a part never contains rows after the step in its name."""
    store.append_metrics([row(12)])
    store.flush(10)
    assert names(store) == ["part-000000000012.parquet"]


def test_compaction_keeps_every_row_once_and_sorted(store, row):
    fill(store, row)
    store.append_metrics([row(30, 0, se_pre=7.0)])
    store.flush(30)
    before = rows_of(store.directory)
    store.compact()
    assert names(store) == ["part-000000000030.parquet"]
    assert rows_of(store.directory) == before
    stored = pq.read_table(store.directory / "metrics" / names(store)[0]).to_pylist()
    assert stored == before


def test_rows_after_a_compaction_survive_the_next_opening(store, row):
    """A resumed run continues next to the compacted part; opening the store again removes nothing
    of it."""
    fill(store, row)
    store.compact()
    fill(store, row, steps=(30, 40))
    reopened = RunStore(store.directory, store.run_id)
    assert [r["step"] for r in rows_of(store.directory)] == [0, 0, 10, 10, 20, 20, 30, 30, 40, 40]
    reopened.compact()
    assert len(rows_of(store.directory)) == 10


def test_restored_part_is_not_taken_for_a_leftover(store, row):
    """A damaged part that was moved away before a compaction may be restored afterwards."""
    fill(store, row)
    part = store.directory / "metrics" / "part-000000000010.parquet"
    part.rename(store.directory / "kept")
    with pytest.warns(DamagedPartWarning, match="part-000000000010.parquet is missing"):
        store.compact()
    (store.directory / "kept").rename(part)
    reopened = RunStore(store.directory, store.run_id)
    assert [r["step"] for r in rows_of(store.directory)] == [0, 0, 10, 10, 20, 20, 30, 30]
    reopened.compact()
    assert [r["step"] for r in rows_of(store.directory)] == [0, 0, 10, 10, 20, 20, 30, 30]


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("step", [-1, 0, 5, 20, 30, 99])
def test_truncation_then_resuming_gives_the_rows_of_an_uninterrupted_run(
    tmp_path, row, step, compacted
):
    whole = RunStore(tmp_path / "whole", "cafe0001")
    fill(whole, row)
    store = RunStore(tmp_path / "run", "cafe0001")
    fill(store, row)
    if compacted:
        store.compact()
    store.append_metrics([row(50)])
    store.truncate_after(step)
    assert [r["step"] for r in rows_of(store.directory)] == [
        s for s in (0, 0, 10, 10, 20, 20, 30, 30) if s <= step
    ]
    resumed = RunStore(tmp_path / "run", "cafe0001")
    fill(resumed, row, steps=[s for s in (0, 10, 20, 30) if s > step])
    assert rows_of(store.directory) == rows_of(whole.directory)
    resumed.compact()
    assert rows_of(store.directory) == rows_of(whole.directory)


def test_truncation_of_a_part_that_somebody_renamed(store, row):
    """The part of the step that is kept contains later rows: these are dropped, and the part
    stays."""
    fill(store, row, steps=(10, 30))
    store.compact()
    folder = store.directory / "metrics"
    (folder / "part-000000000030.parquet").rename(folder / "part-000000000020.parquet")
    with pytest.warns(DamagedPartWarning, match="part-000000000030.parquet is missing"):
        store.truncate_after(20)
    table, _ = read_parts(store.directory, DATASETS["metrics"])
    assert table["step"].to_pylist() == [10, 10]


def test_truncation_drops_waiting_rows_too(store, row):
    store.append_metrics([row(5), row(15)])
    store.truncate_after(10)
    store.flush(15)
    assert [r["step"] for r in rows_of(store.directory)] == [5]


def test_a_damaged_part_is_left_alone_and_named(store, row):
    """Neither compaction nor truncation destroys what a user may still want to restore."""
    fill(store, row)
    part = store.directory / "metrics" / "part-000000000010.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.warns(DamagedPartWarning, match="part-000000000010"):
        store.compact()
    assert len(names(store)) == 4
    with pytest.warns(DamagedPartWarning, match="part-000000000010"):
        store.truncate_after(20)
    assert part.stat().st_size == 100
    assert len(names(store)) == 3


def test_a_damaged_part_is_not_overwritten_and_rows_go_beside_it(store, row):
    fill(store, row, steps=(10,))
    part = store.directory / "metrics" / names(store)[0]
    part.write_bytes(b"")
    for step in (10, 11, 12):
        store.append_metrics([row(step, 5)])
        store.flush(step)
    assert part.read_bytes() == b""
    assert names(store)[1:] == ["part-000000000011.parquet", "part-000000000012.parquet"]
    table, damaged = read_parts(store.directory, DATASETS["metrics"])
    assert table["step"].to_pylist() == [10, 11, 12]
    assert len(damaged) == 1


def test_a_resumed_run_goes_on_beside_a_damaged_part_of_its_own_step(store, row):
    """Rows of step 20 from a later part are kept, in the part after the damaged one."""
    fill(store, row, steps=(0, 10, 20))
    store.append_metrics([row(20, 2), row(40)])
    store.flush(40)
    part = store.directory / "metrics" / "part-000000000020.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.warns(DamagedPartWarning, match="part-000000000020"):
        store.truncate_after(20)
    fill(RunStore(store.directory, store.run_id), row, steps=(30,))
    table, damaged = read_parts(store.directory, DATASETS["metrics"])
    assert table["step"].to_pylist() == [0, 0, 10, 10, 20, 30, 30]
    assert len(damaged) == 1


@pytest.mark.parametrize("where", ["os.replace", "os.fsync", "pyarrow.parquet.write_table"])
def test_a_full_disk_loses_nothing_and_a_retry_succeeds(store, row, monkeypatch, where):
    """ENOSPC at any of the three places: an error with the fix, old files intact, rows kept."""
    fill(store, row, steps=(0,))
    before = rows_of(store.directory)

    def full(*args, **kwargs):
        if where.endswith("write_table"):
            args[1].write(b"PAR1 half of a file")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store.append_metrics([row(0, 5), row(10)])
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(where, full)
            with pytest.raises(StoreError, match=r"No space left.*Free up space"):
                store.flush(10)
        assert rows_of(store.directory) == before
        assert names(store) == ["part-000000000000.parquet"]
    store.flush(10)
    assert len(rows_of(store.directory)) == len(before) + 2


def test_only_what_failed_is_written_again(store, row, monkeypatch):
    """The disk fills up between metrics and scalars: the retry only writes the scalars."""
    store.append_metrics([row(10)])
    store.append_scalars([{"step": 10, "name": "loss", "value": 1.0}])
    real, calls = pq.write_table, []

    def second_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(pq, "write_table", second_fails)
    with pytest.raises(StoreError):
        store.flush(10)
    store.flush(10)
    assert len(calls) == 3
    assert len(rows_of(store.directory)) == len(rows_of(store.directory, "scalars")) == 1


def test_a_failed_compaction_leaves_the_rows(store, row, monkeypatch):
    fill(store, row)
    before, parts = rows_of(store.directory), names(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(StoreError, match="permissions"):
            store.compact()
    assert names(store) == parts
    assert rows_of(store.directory) == before


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file"):
        RunStore(tmp_path / "file" / "run", "a")


def test_a_directory_that_is_gone_does_not_come_back(store, row):
    fill(store, row, steps=(0,))
    store.directory.rename(store.directory.with_name("moved"))
    store.append_metrics([row(10)])
    with pytest.raises(StoreError, match="run no longer exists: it was renamed or deleted"):
        store.flush(10)
    assert not store.directory.exists()


KILLED_AT_EACH_CALL = """
import os, signal, sys
from pathlib import Path
import pyarrow.parquet as pq
from nerve import RunStore

base, operation = Path(sys.argv[1]), sys.argv[2]

def rows(step):
    fixed = dict(tokens_seen=step, ffn="ffn", n_samples=9, d_ff=4, d_in=2, status="ok")
    return [dict(fixed, step=step, layer=layer) for layer in range(2)]

def kill_at(k):
    calls = iter(range(10**6))
    def counted(real):
        def call(*args, **kwargs):
            if next(calls) == k:
                if real is pq.write_table:
                    os.write(args[1].fileno(), b"PAR1 half of a file")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    for module, name in [(os, "replace"), (os, "unlink"), (os, "fsync"), (pq, "write_table")]:
        setattr(module, name, counted(getattr(module, name)))

for k in range(100):
    store = RunStore(base / f"{k:02d}", "cafe0001")
    for step in (0, 10, 20, 30):
        store.append_metrics(rows(step))
        store.flush(step)
        if step == 20 and operation == "truncate":
            store.compact()
    child = os.fork()
    if child == 0:
        kill_at(k)
        if operation == "compact":
            store.compact()
        elif operation == "truncate":
            store.truncate_after(10)
        else:
            store.append_metrics(rows(40))
            store.flush(40)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        assert status == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


@pytest.fixture(scope="module", params=["compact", "truncate", "flush"])
def killed(request, tmp_path_factory) -> tuple[str, list[Path]]:
    """Runs whose process was killed by SIGKILL before the k-th change to the files."""
    base = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-c", KILLED_AT_EACH_CALL, str(base), request.param]
    root = Path(__file__).parents[2]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "PYTHONPATH": str(root)})
    return request.param, sorted(base.iterdir())


def test_sigkill_at_every_call(killed, row):
    """Readers see the same rows immediately; the next start finds nothing left over and can
    continue."""
    operation, directories = killed
    *interrupted, finished = directories
    assert len(interrupted) >= {"compact": 8, "truncate": 7, "flush": 4}[operation]
    before = [(step, layer) for step in (0, 10, 20, 30) for layer in range(2)]
    after = {
        "compact": before,
        "truncate": before[:4],
        "flush": [*before, (40, 0), (40, 1)],
    }[operation]
    for directory in interrupted:
        seen = [(r["step"], r["layer"]) for r in rows_of(directory)]
        assert set(after[:4]) <= set(seen) <= set(before) | set(after)
        if operation != "truncate":
            assert seen in (before, after)
        store = RunStore(directory, "cafe0001")
        assert [(r["step"], r["layer"]) for r in rows_of(directory)] == seen
        assert not [name for name in names(store) if not name.endswith(".parquet")]
        # Nothing is doubled for readers that know nothing of leftovers, but in a half-done
        # truncation, which the resuming run does again before anything else.
        if operation == "truncate":
            store.truncate_after(10)
        assert len(pd.read_parquet(directory / "metrics")) == len(rows_of(directory))
        if operation == "truncate":
            assert [(r["step"], r["layer"]) for r in rows_of(directory)] == after
    assert [(r["step"], r["layer"]) for r in rows_of(finished)] == after


@pytest.mark.parametrize("step", [0, 10, 30])
@pytest.mark.parametrize("reopened", [False, True])
def test_a_deleted_part_is_named_whoever_looks(store, row, step, reopened):
    """The first, a middle one, and the last, which no later part reveals: named by readers, by a
    resumed run, at its end, and afterwards."""
    fill(store, row)
    name = f"part-{step:012d}.parquet"
    (store.directory / "metrics" / name).unlink()
    store = RunStore(store.directory, store.run_id) if reopened else store
    with pytest.warns(DamagedPartWarning, match=rf"metrics/{name} is missing: .*Restore it"):
        store.truncate_after(30)
    fill(store, row, steps=(40,))
    with pytest.warns(DamagedPartWarning, match=f"{name} is missing"):
        store.compact()
    table, (error,) = read_parts(store.directory, DATASETS["metrics"])
    assert f"{name} is missing" in str(error)
    assert len(table) == 8
    (store.directory / ".parts.json").unlink()
    assert read_parts(store.directory, DATASETS["metrics"])[1] == []


def test_a_deleted_dataset_is_named(store, row):
    """And the single part that a compaction left."""
    fill(store, row)
    store.compact()
    shutil.rmtree(store.directory / "metrics")
    for _ in range(2):
        _, (error,) = read_parts(store.directory, DATASETS["metrics"])
        assert "part-000000000030.parquet is missing" in str(error)
        assert read_parts(store.directory, DATASETS["scalars"])[1] == []
        RunStore(store.directory, store.run_id)


def test_a_part_that_comes_back_is_missed_no_more(store, row):
    fill(store, row)
    part = store.directory / "metrics" / "part-000000000030.parquet"
    part.rename(store.directory / "kept")
    assert len(read_parts(store.directory, DATASETS["metrics"])[1]) == 1
    (store.directory / "kept").rename(part)
    assert len(rows_of(store.directory)) == 8


def test_what_a_writer_removes_while_others_read_is_not_missed(store, row, monkeypatch):
    """Between a reader's look at the list and its look at the files."""
    fill(store, row)
    exists, looked_at = os.path.exists, []

    def compacted_meanwhile(path):
        looked_at.append(path)
        if len(looked_at) == 1:
            store.compact()
        return exists(path)

    monkeypatch.setattr("os.path.exists", compacted_meanwhile)
    table, damaged = read_parts(store.directory, DATASETS["metrics"])
    assert (len(table), damaged) == (8, [])
    assert len(names(store)) == 1  # it was compacted


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"metrics": 3}', b"\xff\x00"])
def test_a_damaged_list_keeps_nothing_from_being_read(store, row, content):
    """As after a power failure; the next opening rewrites it."""
    fill(store, row)
    (store.directory / ".parts.json").write_bytes(content)
    assert len(rows_of(store.directory)) == 8
    RunStore(store.directory, store.run_id)
    (store.directory / "metrics" / "part-000000000010.parquet").unlink()
    assert len(read_parts(store.directory, DATASETS["metrics"])[1]) == 1


@pytest.mark.parametrize("step", [None, True, 2.5, float("nan"), "10"])
def test_rows_are_dropped_past_a_whole_step_alone(store, row, step):
    """A comparison with None would drop every row."""
    fill(store, row)
    with pytest.raises(
        StoreError, match=r"after which rows are dropped must be a whole number .*; got"
    ):
        store.truncate_after(step)
    assert len(rows_of(store.directory)) == 8
    store.truncate_after(np.int64(10))
    assert len(rows_of(store.directory)) == 4


def test_opening_removes_stale_temporaries_only(store, row):
    fill(store, row)
    stale = [
        store.directory / "metrics" / ".part-000000000040.parquet.00ff.tmp",
        store.directory / ".run.json.00ff.tmp",
    ]
    kept = [store.directory / "metrics" / "notes.txt", store.directory / ".hydra"]
    for path in [*stale, *kept]:
        path.write_text("half")
    RunStore(store.directory, store.run_id)
    assert not any(path.exists() for path in stale)
    assert all(path.exists() for path in kept)
    assert len(rows_of(store.directory)) == 8


def test_a_flush_does_the_same_work_however_many_parts_there_are(store, row, monkeypatch):
    """It neither reads them nor rewrites their list."""
    fill(store, row)
    forbidden = []
    for name in ("list_parts", "write_manifest"):
        monkeypatch.setattr(f"nerve.storage.store.{name}", lambda *args: forbidden.append(args))
    for step in range(100, 200, 10):
        store.append_metrics([row(step)])
        store.flush(step)
    assert not forbidden
    assert len(read_manifest(store.directory)["metrics"]) == 14


def test_a_list_that_was_cut_off_ends_there(store, row):
    """As a power failure may leave the last line."""
    fill(store, row)
    before = read_manifest(store.directory)
    with open(store.directory / ".parts.json", "ab") as file:
        file.write(b'["metrics", ["part-0000')
    assert read_manifest(store.directory) == before
    store.append_metrics([row(100)])
    store.flush(100)  # behind the cut, and so not on the list until the next opening
    assert len(rows_of(store.directory)) == 9
    RunStore(store.directory, store.run_id)
    assert len(read_manifest(store.directory)["metrics"]) == len(before["metrics"]) + 1


@pytest.mark.parametrize("dataset", ["metrics", "scalars", "spectra"])
def test_a_part_of_another_run_is_not_read_as_the_runs_own(tmp_path, row, dataset):
    """A user copied it into the wrong folder."""
    stores = [RunStore(tmp_path / name, name) for name in ("mine", "other")]
    for store, steps in zip(stores, ((0, 10), (20, 30)), strict=True):
        for step in steps:
            store.append_metrics([row(step)])
            store.append_scalars([{"step": step, "name": "loss", "value": 1.0}])
            values = {"layer": 0, "ffn": "ffn", "site": "pre", "eigenvalues": [1.0]}
            store.append_spectra([{"step": step, **values}])
            store.flush(step)
    folder = tmp_path / "mine" / dataset
    moved = shutil.copy(part_path(tmp_path / "other", DATASETS[dataset], 30), folder)
    with pytest.warns(
        DamagedPartWarning, match="contains rows of run other; the run of its direct"
    ):
        stores[0].compact()
    table, (error,) = read_parts(tmp_path / "mine", DATASETS[dataset], "mine")
    assert table["step"].to_pylist() == [0, 10]
    assert str(moved) in str(error)
    assert "Move it to the directory of its own run" in str(error)
    with pytest.warns(DamagedPartWarning, match="contains rows of run other"):
        stores[0].truncate_after(0)
    assert Path(moved).exists()  # whoever put it there decides


def test_a_run_without_groups_has_no_folder_of_them_and_one_with_them_is_resumed_as_any(
    tmp_path, row
):
    """Rows after a step are also dropped from groups, which are compacted to one part."""
    group = {"layer": 0, "ffn": "ffn", "grouping": "halves", "group": "a", "n_samples": 9, "dim": 4}
    store = RunStore(tmp_path, "a")
    store.append_metrics([row(1)])
    store.append_groups([])
    store.flush(1)
    assert not (tmp_path / "groups").exists()
    for step in (1, 2, 3):
        site = {"site": "stream_in", "status": "ok", "pr": float(step)}
        store.append_groups([group | site | {"step": step}])
        store.flush(step)
    RunStore(tmp_path, "a").truncate_after(2)
    RunStore(tmp_path, "a").compact()
    (part,) = (tmp_path / "groups").iterdir()
    assert pq.read_table(part)["pr"].to_pylist() == [1.0, 2.0]
