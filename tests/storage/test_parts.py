"""Reading parts: duplicate rows once, damaged files named, newer files not guessed at."""

import errno
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from nerve.errors import StoreError
from nerve.storage import parts as parts_module
from nerve.storage.parts import (
    DamagedPartError,
    joined,
    list_parts,
    part_path,
    read_metadata,
    read_part,
    read_parts,
)
from nerve.storage.schema import DATASETS, METRICS_SCHEMA

DATASET = DATASETS["metrics"]


@pytest.fixture
def filled(store, row):
    for step in (5, 40, 300):
        store.append_metrics([row(step, 0), row(step, 1)])
        store.flush(step)
    return store.directory


def test_parts_are_listed_by_step(filled):
    """Also one whose number is not padded."""
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
    """The last of the rows with one key, in order, like pandas' drop_duplicates."""
    tables = [
        pa.Table.from_pylist(
            [row(s % 4, s % 3, se_pre=float(10 * t + s), run_id="a") for s in range(9)],
            schema=METRICS_SCHEMA,
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
    """Overwritten in the middle, with a footer that can still be read."""
    path = part_path(filled, DATASET, 40)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    table, damaged = read_parts(filled, DATASET)
    assert [str(path) in str(error) for error in damaged] == [True]
    assert len(table) == 4


@pytest.mark.parametrize("name", [field.name for field in METRICS_SCHEMA if not field.nullable])
def test_a_part_without_a_required_column_is_damaged(filled, name):
    path = part_path(filled, DATASET, 40)
    pq.write_table(pq.read_table(path).drop_columns([name]), path)
    with pytest.raises(DamagedPartError, match=f"lacks the columns {name}"):
        read_part(path, DATASET)


def test_a_part_without_a_value_in_a_required_column_is_damaged(filled):
    path = part_path(filled, DATASET, 40)
    table = pq.read_table(path)
    place = table.schema.names.index("layer")
    pq.write_table(table.set_column(place, "layer", pa.nulls(2, pa.int16())), path)
    with pytest.raises(DamagedPartError, match="layer"):
        read_part(path, DATASET)


NULLABLE = [field.name for field in METRICS_SCHEMA if field.nullable]


@pytest.mark.parametrize("without", [[name] for name in NULLABLE] + [NULLABLE], ids=str)
def test_a_nullable_column_that_a_part_lacks_reads_as_null(filled, without):
    """Each column alone and all together; the others keep their places, values and types."""
    path = part_path(filled, DATASET, 40)
    whole = read_part(path, DATASET)
    pq.write_table(pq.read_table(path).drop_columns(without), path)
    table, damaged = read_parts(filled, DATASET)
    assert not damaged
    assert table.schema.equals(METRICS_SCHEMA)
    old = table.filter(pc.equal(table["step"], 40))
    assert all(old[name].null_count == 2 for name in without)
    assert old.drop_columns(without).equals(whole.drop_columns(without))
    assert table.filter(pc.equal(table["step"], 5))[without[0]].null_count == 0


def test_a_column_that_is_not_the_datasets_is_left_out(filled):
    """A user's column in addition to those of the dataset."""
    path = part_path(filled, DATASET, 40)
    whole = read_part(path, DATASET)
    pq.write_table(pq.read_table(path).append_column("note", pa.array(["a", "b"])), path)
    assert read_part(path, DATASET).equals(whole)


def chunk_ends(path: Path) -> int:
    """Where the pages of a Parquet file end."""
    group = pq.read_metadata(path).row_group(0)
    chunks = [group.column(i) for i in range(group.num_columns)]
    return max(
        (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size
        for chunk in chunks
    )


@pytest.mark.parametrize(("mask", "first"), [(0x01, 0), (0x10, 5)])
def test_a_changed_byte_anywhere_is_harmless_or_named(filled, mask, first):
    """Changes every tenth byte of a part separately: the rows are the same, or the part is damaged.

    Without verification, the same changes would silently give other numbers or nulls.
    """
    path = part_path(filled, DATASET, 40)
    content, whole, end = path.read_bytes(), read_part(path, DATASET), chunk_ends(path)
    whole_metadata = read_metadata(path)
    named, silent_in_pages, silent_in_footer = 0, 0, 0
    for place in range(first, len(content), 10):
        changed = bytearray(content)
        changed[place] ^= mask
        path.write_bytes(changed)
        try:
            assert read_part(path, DATASET).equals(whole), place
            assert read_metadata(path) == whole_metadata, place
            continue
        except DamagedPartError as error:
            named += str(path) in str(error)
        is_other = differs_unverified(changed, whole)
        silent_in_pages += is_other and place < end
        silent_in_footer += is_other and place >= end
    assert named > len(content) / 20
    assert silent_in_pages > 5
    assert silent_in_footer > 5


def differs_unverified(content: bytes, whole: pa.Table) -> bool:
    """Whether a reader without verification reads other rows from the file."""
    try:
        with pq.ParquetFile(pa.BufferReader(bytes(content))) as file:
            table = file.read(use_threads=False)
        missing = [name for name in METRICS_SCHEMA.names if name not in table.schema.names]
        for name in missing:
            table = table.append_column(name, pa.nulls(len(table), pa.float64()))
        return not table.select(METRICS_SCHEMA.names).cast(METRICS_SCHEMA).equals(whole)
    except (pa.ArrowException, OSError, ValueError):
        return False


@pytest.mark.parametrize("name", list(DATASETS))
def test_whatever_the_store_writes_is_verified(store, row, name):
    """A changed byte in the middle of a page is detected after a flush, a merge, a truncation and a
    compaction, in every dataset."""
    spectrum = {"layer": 0, "ffn": "ffn", "site": "pre", "eigenvalues": [4.0, 3.0, 2.0, 1.0]}
    group = {"ffn": "ffn", "site": "pre", "grouping": "halves", "group": "a", "n_samples": 9}
    group |= {"dim": 4, "pr": 2.0, "status": "ok"}

    def append(step: int, layer: int = 0) -> None:
        store.append_metrics([row(step, layer)])
        store.append_spectra([spectrum | {"step": step, "layer": layer}])
        store.append_scalars([{"step": step, "name": f"of {layer}", "value": 1.0}])
        store.append_groups([group | {"step": step, "layer": layer}])
        store.flush(max(step, 1))

    def check() -> None:
        dataset = DATASETS[name]
        for path in list_parts(store.directory, dataset):
            content = path.read_bytes()
            changed = bytearray(content)
            changed[chunk_ends(path) - 1] ^= 1
            path.write_bytes(changed)
            with pytest.raises(DamagedPartError, match="CRC"):
                read_part(path, dataset)
            path.write_bytes(content)
            changed = bytearray(content)
            changed[content.rindex(b"run_id")] ^= 1
            path.write_bytes(changed)
            with pytest.raises(DamagedPartError, match="checksum of its footer"):
                read_part(path, dataset)
            path.write_bytes(content)

    append(1)
    check()
    append(1, layer=1)
    check()
    append(2)
    append(3)
    store.truncate_after(2)
    check()
    append(4)
    store.compact()
    assert len(list_parts(store.directory, DATASETS[name])) == 1
    check()


def test_a_mark_of_a_compaction_that_was_changed_removes_nothing(filled, store):
    """The mark names part 5; with one changed byte it would name part 4, which belongs to another
    writer."""
    store.compact()
    (path,) = list_parts(filled, DATASET)
    other = part_path(filled, DATASET, 4)
    other.write_bytes(path.read_bytes())
    content = path.read_bytes()
    assert content.count(b"part-000000000005.parquet") == 1
    path.write_bytes(content.replace(b"part-000000000005.parquet", b"part-000000000004.parquet"))
    type(store)(filled, store.run_id)
    assert other.exists()


def test_a_part_without_checksums_still_reads(filled):
    """As written by an older nerve."""
    path = part_path(filled, DATASET, 40)
    whole = read_part(path, DATASET)
    pq.write_table(whole, path, compression="zstd")
    assert read_part(path, DATASET).equals(whole)


def test_a_part_rewritten_by_pandas_still_reads(filled):
    """Other string and integer widths are cast to the schema."""
    path = part_path(filled, DATASET, 40)
    pd.read_parquet(path).astype({"layer": "int64"}).to_parquet(path)
    table, damaged = read_parts(filled, DATASET)
    assert not damaged
    assert table.schema.equals(METRICS_SCHEMA)
    assert len(table) == 6


def test_a_newer_schema_is_not_guessed_at(filled):
    path = part_path(filled, DATASET, 40)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"nerve_schema_version": "3"}), path)
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


def test_a_part_that_is_listed_and_never_there_is_named(filled, monkeypatch):
    """As on a network file system with an outdated listing: reading ends, with the other parts."""
    real = parts_module.list_parts
    ghost = part_path(filled, DATASET, 50)
    monkeypatch.setattr(parts_module, "list_parts", lambda *of: [*real(*of), ghost])
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    table, damaged = read_parts(filled, DATASET)
    assert len(table) == 6
    assert [ghost.name in str(error) for error in damaged] == [True]
    assert 1 < sum(waits) < 5


def test_hidden_files_are_no_parts(filled):
    """macOS adds one for each file that it copies to another file system."""
    for path in list_parts(filled, DATASET):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    table, damaged = read_parts(filled, DATASET)
    assert len(table) == 6
    assert not damaged


def test_what_is_in_the_place_of_a_part_is_named(filled):
    """A link to itself, a broken link, and a name that is not UTF-8; a folder is not a part."""
    folder = filled / "metrics"
    (folder / "self.parquet").symlink_to(folder / "self.parquet")
    (folder / "nowhere.parquet").symlink_to(folder / "gone")
    (folder / os.fsdecode(b"caf\xe9.parquet")).write_bytes(b"")
    (folder / "folder.parquet").mkdir()
    table, damaged = read_parts(filled, DATASET)
    assert len(table) == 6
    assert len(damaged) == 3


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_of_parts_that_cannot_be_listed_is_named(filled, monkeypatch, code):
    """Otherwise its run would silently have no rows."""

    def refuse(path):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DamagedPartError, match="metrics cannot be listed"):
        list_parts(filled, DATASET)
