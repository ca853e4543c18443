import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nerve.data.files import text_files
from nerve.errors import ConfigError, DataError


def documents(*paths, **values) -> dict[str, str]:
    return {document.name: document.text for document in text_files(paths, **values).documents()}


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def test_plain_text_files_are_documents_in_the_order_of_their_paths(tmp_path):
    for name, text in {"b.txt": "b\r\n", "a.md": "ä", "sub/c.py": "c = 1"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    paths = [tmp_path / "b.txt", tmp_path / "sub" / "c.py", f"{tmp_path}/*.md"]
    assert documents(*paths) == {"a.md": "ä", "b.txt": "b\r\n", "sub/c.py": "c = 1"}
    assert list(documents(*paths)) == ["a.md", "b.txt", "sub/c.py"]
    assert documents(f"{tmp_path}/**/*.*", tmp_path / "b.txt") == documents(*paths)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_the_name_of_a_file_need_not_be_utf_8(tmp_path, suffix):
    path = tmp_path / os.fsdecode(b"caf\xe9" + suffix.encode())
    if suffix == ".txt":
        path.write_text("text")
    else:
        write_rows(tmp_path / f"plain{suffix}", [{"text": "text"}]).rename(path)
    (found,) = text_files(f"{tmp_path}/*").named_hashes
    assert found[0].startswith(path.name)


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
    assert "Set data.corpus.text_column to the column with the text." in str(error.value)


def test_blank_lines_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n  \n{"text": "b"}')
    assert list(documents(tmp_path / "a.jsonl").values()) == ["a", "b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_rows_without_a_text_are_left_out_and_counted_once(tmp_path, suffix, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": "c"}, {"text": None}, {"text": "d"}, {"text": None}]
    corpus = text_files(write_rows(tmp_path / f"rows{suffix}", rows))
    for _ in range(2):
        assert [document.text for document in corpus.documents()] == ["c", "d"]
    assert caplog.messages == [f"2 rows without text are left out of {tmp_path / f'rows{suffix}'}"]


def test_a_line_that_is_not_json_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 3 is not JSON"):
        documents(tmp_path / "a.jsonl")


def test_a_line_that_is_no_object_is_named_by_file_and_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('"text"\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 1 is of type str"):
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
        DataError,
        match=r"^Each of data\.corpus\.paths .* matches none\. Check the path; for all text files",
    ):
        text_files([f"{tmp_path}/there.md", f"{tmp_path}/{pattern}"])


def test_another_kind_of_file_is_an_error_with_those_that_are_known(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(
        DataError, match=r"\.txt, \.md, \.py, \.jsonl, .*\.parquet, .*\.gz.*; got .*a\.csv"
    ):
        text_files(tmp_path / "a.csv")


def test_files_that_are_all_empty_are_an_error(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(DataError, match="must contain at least one document"):
        _ = text_files(f"{tmp_path}/*.txt").hashes


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_file_that_vanished_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).touch()
    corpus = text_files(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} (is not|cannot be read) \(.*No such file"):
        _ = corpus.fingerprint


MARKER = "<|endoftext|>"


@pytest.mark.parametrize(
    ("separator", "text"),
    [
        (MARKER, f"one\ntwo\n{MARKER}\nthree\n{MARKER}\n\n{MARKER}\nfour"),
        (MARKER, f"one\ntwo\n{MARKER}three\n{MARKER}four\n{MARKER}\n"),
        ("\n\n\n", "one\ntwo\n\n\nthree\n\n\nfour\n\n\n"),
        ("-----", "one\ntwo\n-----\nthree\n-----\nfour"),
        ("%%", "one\r\ntwo\r\n%%\r\nthree\r\n%%\r\nfour"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_separator_makes_documents_of_what_stands_between(tmp_path, name, separator, text):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith("l"):
        write_rows(path, [{"text": text}])
    else:
        path.write_bytes(text.encode())
    texts = [text.strip() for text in documents(path, separator=separator).values()]
    assert [text.replace("\r", "") for text in texts] == ["one\ntwo", "three", "four"]


def test_a_document_between_separators_is_not_cut(tmp_path):
    (tmp_path / "a.txt").write_text("line of text\n" * 5000 + MARKER + "\n" + "other\n" * 5000)
    texts = list(documents(tmp_path / "a.txt", separator=MARKER).values())
    assert texts == ["line of text\n" * 5000, "other\n" * 5000]


@pytest.mark.parametrize("marker", [MARKER, "</s>", "<|end_of_text|>", "<eos>"])
@pytest.mark.parametrize("text", ["one\n{}\ntwo\n{}\n", "one{}\ntwo{}", "{}one\n{}two"])
def test_a_known_marker_at_an_end_of_a_line_is_said_with_what_to_set(
    tmp_path, marker, text, caplog
):
    (tmp_path / "a.txt").write_text(text.format(marker, marker))
    corpus = text_files(tmp_path / "a.txt")
    assert len(list(corpus.documents())) == len(list(corpus.documents())) == 1
    [message] = caplog.messages
    assert f"{tmp_path / 'a.txt'} has {marker!r} at ends of lines" in message
    assert message.endswith(f"set \"data.corpus.separator='{marker}'\"")


@pytest.mark.parametrize("text", [f"a {MARKER} b", "<s>x</s> y", "plain"])
def test_a_marker_within_a_line_is_mere_text(tmp_path, text, caplog):
    (tmp_path / "a.txt").write_text(text)
    assert documents(tmp_path / "a.txt") == {"a.txt": text}
    assert not caplog.messages


@pytest.mark.parametrize("separator", ["", 3, ["a"]])
def test_a_separator_must_be_a_text(tmp_path, separator):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"data\.corpus\.separator must be"):
        text_files(tmp_path / "a.txt", separator=separator)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json", ".jsonl.gz"])
def test_a_file_with_one_long_row_is_cut_as_plain_text_is(tmp_path, suffix):
    text = "line of text\n" * 5000
    (tmp_path / "plain.txt").write_text(text)
    path = write_rows(tmp_path / f"one{suffix}", [{"text": text}])
    assert list(documents(path).values()) == list(documents(tmp_path / "plain.txt").values())


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_long_rows_are_documents_where_there_are_several(tmp_path, suffix):
    texts = ["line of text\n" * 5000, "x"]
    path = write_rows(tmp_path / f"two{suffix}", [{"text": text} for text in texts])
    assert list(documents(path).values()) == texts


@pytest.mark.parametrize("ending", [".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.JSON", "a"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path, name, ending):
    data = b'{"text": "one"}\n{"text": "two"}\n'
    plain, path = tmp_path / name, tmp_path / f"{name}{ending}"
    plain.write_bytes(data)
    with pa.CompressedOutputStream(path, "zstd" if ending == ".zst" else "gzip") as file:
        file.write(data)
    assert list(documents(path).values()) == list(documents(plain).values())


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no such thing"])
def test_a_damaged_compressed_file_is_named(tmp_path, name, ending, damage):
    path = tmp_path / f"{name}{ending}"
    with pa.CompressedOutputStream(path, "zstd" if ending == ".zst" else "gzip") as file:
        file.write(b'{"text": "one"}\n' * 100)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"complete; {path} cannot be read"):
        documents(path)


@pytest.mark.parametrize("name", ["A.TXT", "A.Md", "README", "notes.PY"])
def test_upper_case_endings_and_none_are_plain_text(tmp_path, name):
    (tmp_path / name).write_text("text")
    assert documents(tmp_path / name) == {name: "text"}


@pytest.mark.parametrize(
    "text",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '\ufeff\n[\n {"text": "a"},\n {"text": "b"}\n]\n',
        '{"text": "a"}\n{"text": "b"}\n',
    ],
)
def test_a_json_file_holds_an_array_or_lines(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert list(documents(tmp_path / "a.json").values()) == ["a", "b"]


def test_a_json_file_of_one_object_over_several_lines_is_one_row(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "a"\n}')
    assert list(documents(tmp_path / "a.json").values()) == ["a"]


@pytest.mark.parametrize("content", ['["a"]', "3", '{"text": ', "[1"])
def test_a_json_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json"):
        documents(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a"])
@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
def test_utf16_and_utf32_are_refused_by_their_name(tmp_path, name, encoding):
    (tmp_path / name).write_bytes('{"text": "plain text"}\n'.encode(encoding))
    named = encoding[:6].upper()
    with pytest.raises(DataError, match=rf"must be UTF-8; .*{name}.* is {named}.*iconv -f {named}"):
        documents(tmp_path / name)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_a_column_may_lie_in_another(tmp_path, suffix):
    rows = [{"meta": {"a": {"text": "x"}, "n": 1}}, {"meta": None}, {"meta": {"a": None, "n": 2}}]
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    assert list(documents(path, text_column="meta.a.text").values()) == ["x"]
    with pytest.raises(DataError, match=r"has no 'meta\.b', only 'a', 'n' in 'meta'"):
        documents(path, text_column="meta.b")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".json"])
def test_a_column_whose_name_has_a_dot_comes_before_one_in_another(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", [{"meta.text": "x", "meta": {"text": "y"}}])
    assert list(documents(path, text_column="meta.text").values()) == ["x"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
        pa.string_view(),
    ],
)
def test_parquet_texts_may_be_of_any_kind_of_string(tmp_path, kind):
    column = pa.array(["a", None, "b", "a"]).cast(kind)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": column}), path)
    assert list(documents(path).values()) == ["a", "b", "a"]


@pytest.mark.parametrize("path", ["~/a.txt", "~/*.txt", Path("~/a.txt")])
def test_paths_begin_at_home_or_where_the_command_was_given(tmp_path, monkeypatch, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert documents(path) == {"a.txt": "a"}
    monkeypatch.chdir(tmp_path)
    corpus = text_files("a.txt")
    monkeypatch.chdir("/")
    assert [document.text for document in corpus.documents()] == ["a"]
