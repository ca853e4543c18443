import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nerve.data.files import text_files
from nerve.errors import DataError


def documents(*paths, **values) -> dict[str, str]:
    return {document.name: document.text for document in text_files(paths, **values).documents()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plain_text_files_are_documents_in_the_order_of_their_paths(tmp_path):
    for name, text in {"b.txt": "b\r\n", "a.md": "ä", "sub/c.py": "c = 1"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    paths = [tmp_path / "b.txt", tmp_path / "sub" / "c.py", f"{tmp_path}/*.md"]
    assert documents(*paths) == {"a.md": "ä", "b.txt": "b\r\n", "sub/c.py": "c = 1"}
    assert list(documents(*paths)) == ["a.md", "b.txt", "sub/c.py"]
    assert documents(f"{tmp_path}/**/*.*", tmp_path / "b.txt") == documents(*paths)


def test_names_and_the_fingerprint_do_not_depend_on_where_the_files_lie(tmp_path):
    corpora = []
    for folder in (tmp_path / "a", tmp_path / "far" / "b"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text("x")
        (folder / "y.txt").write_text("y")
        corpora.append(text_files(f"{folder}/*.txt"))
    assert corpora[0].fingerprint == corpora[1].fingerprint


@pytest.mark.parametrize(
    "text", ["line of text\n" * 5000, "word " * 9000, "x" * 40_000, "short", "é\n\n" * 20_000]
)
def test_a_long_text_is_cut_at_line_ends_or_words_and_nothing_is_lost(tmp_path, text):
    (tmp_path / "long.txt").write_text(text)
    parts = list(documents(tmp_path / "long.txt").values())
    assert "".join(parts) == text
    assert all(len(part) <= 16_384 for part in parts)
    assert len(parts) <= len(text) // 16_000 + 1
    separator = next((end for end in "\n " if end in text), "")
    assert all(part.endswith(separator) for part in parts[:-1])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert documents(tmp_path / "bom.txt") == {"bom.txt": "abc"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_each_row_is_a_document_and_empty_ones_are_skipped(tmp_path, suffix):
    rows = [{"body": "one\ntwo", "n": 1}, {"body": "", "n": 2}, {"body": "λ", "n": 3}]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert list(documents(path, text_column="body").values()) == ["one\ntwo", "λ"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_is_an_error_with_the_columns_that_there_are(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", [{"body": "one", "n": 1}])
    with pytest.raises(
        DataError, match=rf"rows{suffix}.* has no 'text', only 'body', 'n'"
    ) as error:
        documents(path)
    assert str(error.value).startswith("data.corpus.text_column must be")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_column_that_holds_no_text_is_an_error(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", [{"text": 1}])
    with pytest.raises(DataError, match=rf"must be a string.*rows{suffix}.* int") as error:
        documents(path)
    assert "Set data.corpus.text_column to the column of texts." in str(error.value)


def test_blank_lines_and_missing_texts_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    write_rows(tmp_path / "b.parquet", [{"text": "c"}, {"text": None}])
    assert list(documents(f"{tmp_path}/*").values()) == ["a", "b", "c"]


def test_a_line_that_is_not_json_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not JSON"):
        documents(tmp_path / "a.jsonl")


def test_a_line_that_is_no_object_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('"text"\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 holds a str"):
        documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "place"), [("a.txt", "a.txt has"), ("a.jsonl", "a.jsonl, line 2 has")]
)
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, name, place):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n\xe9t\xe9')
    with pytest.raises(DataError, match=rf"{place} the byte 0xe9 at position \d+\. Convert"):
        documents(tmp_path / name)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"PAR1"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = write_rows(tmp_path / "rows.parquet", [{"text": "a" * 100}])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        documents(path)


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [{"text": str(i) * 50} for i in range(100)])
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read"):
        documents(path)


@pytest.mark.parametrize("pattern", ["*.txt", "absent.txt", "."])
def test_a_path_that_matches_no_file_is_an_error(tmp_path, pattern):
    (tmp_path / "there.md").touch()
    with pytest.raises(
        DataError, match=r"^data\.corpus\.paths .* matches none\. Check the path; for all files of"
    ):
        text_files([f"{tmp_path}/there.md", f"{tmp_path}/{pattern}"])


def test_another_kind_of_file_is_an_error_with_those_that_are_known(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"\.txt, \.md, \.py, \.jsonl, \.parquet; got .*a\.csv"):
        text_files(tmp_path / "a.csv")


def test_files_that_are_all_empty_are_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="must hold at least one document"):
        _ = text_files(f"{tmp_path}/*.txt").hashes


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_vanished_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).touch()
    corpus = text_files(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} (is not|cannot be read) \(.*No such file"):
        _ = corpus.fingerprint
