"""Reading parts: doubled rows once, damaged files named, newer files not guessed at."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nerve.errors import StoreError
from nerve.results import parts as parts_module
from nerve.results.parts import DamagedPartError, joined, list_parts, part_path, read_parts
from nerve.results.schema import DATASETS, METRICS

DATASET = DATASETS["metrics"]


@pytest.fixture
def filled(store, row):
    for step in (5, 40, 300):
        store.append_metrics([row(step, 0), row(step, 1)])
        store.flush(step)
    return store.directory


def test_parts_are_listed_by_step(filled):
    """Also one whose number somebody did not pad."""
    path = filled / "metrics" / "part-7.parquet"
    path.write_bytes(part_path(filled, DATASET, 40).read_bytes())
    found = [p.name for p in list_parts(filled, DATASET)]
    assert found == [
        "part-000000000005.parquet",
        "part-7.parquet",
        "part-000000000040.parquet",
        "part-000000000300.parquet",
    ]


def test_joined_agrees_with_pandas(row):
    """The last of the rows with one key, in order, as pandas' drop_duplicates has it."""
    tables = [
        pa.Table.from_pylist(
            [row(s % 4, s % 3, se_pre=float(10 * t + s), run_id="a") for s in range(9)],
            schema=METRICS,
        )
        for t in range(3)
    ]
    ours = joined(tables, DATASET).to_pandas()
    frame = pd.concat([table.to_pandas() for table in tables], ignore_index=True)
    theirs = frame.drop_duplicates(list(DATASET.key), keep="last").reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, theirs)


def test_rows_doubled_within_one_file_count_once(filled):
    path = part_path(filled, DATASET, 40)
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    assert len(read_parts(filled, DATASET)[0]) == 6


@pytest.mark.parametrize("length", [0, 3, 100, 2000, -1])
def test_a_cut_part_is_left_out_and_named(filled, length):
    path = part_path(filled, DATASET, 40)
    path.write_bytes(path.read_bytes()[:length])
    table, (error,) = read_parts(filled, DATASET)
    assert table["step"].to_pylist() == [5, 5, 300, 300]
    assert str(path) in str(error)


def test_flipped_bytes_are_left_out_and_named(filled):
    """Overwritten in the middle, with a footer that still reads well."""
    path = part_path(filled, DATASET, 40)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    table, damaged = read_parts(filled, DATASET)
    assert [str(path) in str(error) for error in damaged] == [True]
    assert len(table) == 4


def test_a_part_of_other_columns_is_damaged(filled):
    path = part_path(filled, DATASET, 40)
    pq.write_table(pq.read_table(path).drop_columns(["js"]), path)
    with pytest.raises(DamagedPartError, match="js"):
        parts_module.read_part(path, DATASET)


def test_a_part_rewritten_by_pandas_still_reads(filled):
    """Other string and integer widths are cast to the schema."""
    path = part_path(filled, DATASET, 40)
    pd.read_parquet(path).astype({"layer": "int64"}).to_parquet(path)
    table, damaged = read_parts(filled, DATASET)
    assert not damaged
    assert table.schema.equals(METRICS)
    assert len(table) == 6


def test_a_newer_schema_is_not_guessed_at(filled):
    path = part_path(filled, DATASET, 40)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"nerve_schema_version": "2"}), path)
    with pytest.raises(StoreError, match="newer") as caught:
        read_parts(filled, DATASET)
    assert not isinstance(caught.value, DamagedPartError)


def test_a_compaction_while_reading_loses_nothing(filled, store, monkeypatch):
    """The parts vanish between listing and reading; the reader starts again."""
    real = parts_module.list_parts

    def listed_before_compaction(directory, dataset):
        monkeypatch.undo()
        found = real(directory, dataset)
        store.compact()
        return found

    monkeypatch.setattr(parts_module, "list_parts", listed_before_compaction)
    table, damaged = read_parts(filled, DATASET)
    assert not damaged
    assert sorted(table["step"].to_pylist()) == [5, 5, 40, 40, 300, 300]
    assert len(real(filled, DATASET)) == 1
