import os
import re
from pathlib import Path

import pytest

from nerve.data.corpus import Corpus, Document, DocumentHash, python_source, validation_digests
from nerve.errors import DataError


def corpus_of(*documents: tuple[str, str]) -> Corpus:
    return Corpus("c", lambda: [Document(*document) for document in documents])


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def hashed(*sizes: int) -> list[DocumentHash]:
    return [DocumentHash(bytes([i]) * 32, size) for i, size in enumerate(sizes)]


def test_fingerprint_depends_on_each_name_content_and_the_order_and_on_nothing_else():
    first, second = ("a", "x = 1"), ("b", "y = 2")
    original = corpus_of(first, second).fingerprint
    assert corpus_of(first, second).fingerprint == original
    changed = {
        corpus_of(second, first).fingerprint,
        corpus_of(first, ("c", "y = 2")).fingerprint,
        corpus_of(first, ("b", "y = 3")).fingerprint,
        corpus_of(first).fingerprint,
    }
    assert len(changed | {original}) == 5


def test_the_fingerprint_takes_the_bytes_of_a_name_that_is_not_utf_8():
    names = [os.fsdecode(name) for name in (b"caf\xe9.txt", b"caf\xe8.txt", "café.txt".encode())]
    assert len({corpus_of((name, "text")).fingerprint for name in names}) == 3


def test_documents_of_white_space_are_skipped_and_sizes_count_utf8_bytes():
    corpus = corpus_of(("empty", ""), ("blank", " \n\t"), ("full", "λ₁"))
    assert [document.name for document in corpus.documents()] == ["full"]
    assert [n_bytes for _, n_bytes in corpus.hashes] == [5]


def test_a_corpus_without_text_is_an_error_that_names_it():
    with pytest.raises(DataError, match="'c' has none"):
        _ = corpus_of(("empty", "")).hashes


def test_half_a_surrogate_pair_is_an_error_that_names_the_document():
    with pytest.raises(DataError, match=r"'bad.json' of the corpus 'c'.*at character 3"):
        _ = corpus_of(("bad.json", "abc\ud800")).fingerprint


def test_a_request_names_the_contents_without_reading_them():
    def fail():
        raise AssertionError("read")

    assert Corpus("hub", fail, request="dataset@revision").key == "dataset@revision"


def test_validation_takes_documents_by_digest_until_the_share_is_reached():
    assert validation_digests(hashed(30, 30, 30, 10), 0.5) == {bytes([0]) * 32, bytes([1]) * 32}
    assert validation_digests(hashed(30, 30, 30, 10), 0.3) == {bytes([0]) * 32}
    assert len(validation_digests(hashed(1, 1000), 0.0005)) == 1


def test_the_split_does_not_depend_on_the_order_of_the_documents():
    assert validation_digests(hashed(5, 6, 7)[::-1], 0.5) == validation_digests(
        hashed(5, 6, 7), 0.5
    )


def test_copies_of_a_document_count_as_one():
    copies = hashed(10, 10) * 2
    assert validation_digests(copies, 0.5) == {bytes([0]) * 32}


@pytest.mark.parametrize(("sizes", "val_fraction"), [((100,), 0.05), ((1, 1000), 0.5)])
def test_a_split_that_leaves_no_training_document_is_an_error(sizes, val_fraction):
    expected = rf"got {len(sizes)}, not counting copies, .*={val_fraction} leaves none for training"
    with pytest.raises(DataError, match=expected):
        validation_digests(hashed(*sizes), val_fraction)


def test_python_source_is_sorted_and_does_not_depend_on_where_the_root_lies(tmp_path):
    files = {"b": "b = 1", "a__z": "z = 1", "a": "a = 1"}
    here = python_source(write(tmp_path / "here", **files))
    there = python_source(str(write(tmp_path / "far" / "there", **files)))
    assert [document.name for document in here.documents()] == ["a.py", "a/z.py", "b.py"]
    assert here.fingerprint == there.fingerprint


def test_tests_packages_hidden_folders_and_files_of_the_build_are_left_out(tmp_path):
    left_out = ["test__a", "x__tests__a", "idlelib__idle_test__a", "lib2to3__a", ".git__a"]
    left_out += ["site-packages__a", "config-3.11-x86__a", "_sysconfigdata_linux", "sitecustomize"]
    write(tmp_path, kept="kept = 1", testing__kept="kept = 2", **dict.fromkeys(left_out, "no = 1"))
    names = [document.name for document in python_source(tmp_path).documents()]
    assert names == ["kept.py", "testing/kept.py"]


def test_only_folders_below_the_root_are_left_out(tmp_path):
    root = write(tmp_path / "tests" / "site-packages", kept="kept = 1")
    assert len(python_source(root).hashes) == 1


def test_several_roots_follow_each_other_as_given(tmp_path):
    first, second = write(tmp_path / "1", z="z = 1"), write(tmp_path / "2", a="a = 1")
    names = [document.name for document in python_source([first, second]).documents()]
    assert names == ["z.py", "a.py"]


def test_files_are_decoded_by_their_cookie_and_undecodable_ones_left_out_with_a_warning(
    tmp_path, caplog
):
    write(tmp_path, utf8="s = 'é'")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"s = '\xe9'")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    corpus = python_source(tmp_path)
    for _ in range(2):  # which is logged once
        texts = {document.name: document.text for document in corpus.documents()}
    (message,) = caplog.messages
    assert re.match(r"2 Python files.*broken\.py", message)
    assert set(texts) == {"utf8.py", "latin.py"}
    assert texts["latin.py"].endswith("s = 'é'")


def test_a_file_that_vanished_is_an_error_that_names_it(tmp_path):
    corpus = python_source(write(tmp_path, gone="gone = 1"))
    os.remove(tmp_path / "gone.py")
    with pytest.raises(DataError, match=r"gone.py is not \(No such file"):
        _ = corpus.hashes


@pytest.mark.parametrize("root", ["missing", "a.py", "stdlibs"])
def test_a_root_that_is_no_folder_is_an_error_with_the_special_words(tmp_path, root):
    write(tmp_path, a="a = 1")
    with pytest.raises(DataError, match=rf"stdlib, site-packages; got '.*{root}'"):
        python_source(tmp_path / root)


def test_roots_without_python_files_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no \*.py file below"):
        python_source([tmp_path])


def test_the_special_word_site_packages_is_the_environments_own():
    names = {document.name for document in python_source("site-packages").documents()}
    assert "numpy/__init__.py" in names


def test_the_standard_library_is_whole_and_has_no_tests():
    names = {document.name for document in python_source().documents()}
    assert {"json/decoder.py", "asyncio/tasks.py", "argparse.py"} <= names
    assert not any({"test", "tests", "idle_test"} & set(Path(name).parts) for name in names)
    assert len(names) > 400


@pytest.mark.parametrize("start", ["~", "."])
def test_roots_begin_at_home_or_where_they_were_given(tmp_path, monkeypatch, start):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text("a = 1")
    corpus = python_source(f"{start}/src")
    monkeypatch.chdir("/")
    assert [document.text for document in corpus.documents()] == ["a = 1"]
