"""A corpus whose files have not changed is not read again, and any change to them is detected."""

import logging
import os
import shutil
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nerve.data import cache as cache_module
from nerve.data.cache import cached_tokens, key_of
from nerve.data.corpus import Corpus, python_source
from nerve.data.files import text_files
from nerve.data.tokenizer import TokenizerSpec


@pytest.fixture(autouse=True)
def _at_rest(monkeypatch):
    """Makes files count as settled immediately, instead of after two seconds."""
    monkeypatch.setattr(cache_module, "SETTLED_AFTER_NS", 0)


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.txt").write_text(f"the text of {name}\n" * 20)
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def corpus_of(files: Path, reads: list[int] | None = None) -> Corpus:
    """The corpus of a new start; `reads` gets an entry each time it is read."""
    corpus = text_files(f"{files}/*.txt")

    def read():
        if reads is not None:
            reads.append(1)
        return corpus.read()

    return replace(corpus, read=read)


def key(files: Path, cache: Path, reads: list[int] | None = None) -> str:
    return key_of(corpus_of(files, reads), cache)


def test_the_second_start_opens_none_of_the_files(files, cache, monkeypatch):
    """Neither to name the corpus nor to open its tokens, which are the same."""
    first = cached_tokens(corpus_of(files), TokenizerSpec(300), 0.3, cache)

    def refuse(*_):
        raise AssertionError("read")

    monkeypatch.setattr("nerve.data.files.read_rows", refuse)
    again = cached_tokens(corpus_of(files), TokenizerSpec(300), 0.3, cache)
    assert again.path == first.path
    assert again.meta.corpus_fingerprint == corpus_fingerprint(files, monkeypatch)


def corpus_fingerprint(files: Path, monkeypatch) -> str:
    monkeypatch.undo()
    return corpus_of(files).fingerprint


def _append(file: Path) -> None:
    file.write_text(file.read_text() + "more")


def _overwrite(file: Path) -> None:
    """Overwrites with the same number of bytes, and restores the time."""
    status = file.stat()
    file.write_text(file.read_text().replace("text", "TEXT"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(file: Path) -> None:
    """Replaces a file by another one of the same size and time, like a copy that preserves
    times."""
    other = file.with_suffix(".new")
    other.write_text(file.read_text().replace("text", "TEXT"))
    shutil.copystat(file, other)
    os.replace(other, file)


def _add(file: Path) -> None:
    file.with_name("d.txt").write_text("one more\n")


def _rename(file: Path) -> None:
    file.rename(file.with_name("z.txt"))


@pytest.mark.parametrize("change", [_append, _overwrite, _replace, _add, _rename, Path.unlink])
def test_whatever_changes_the_files_is_seen(files, cache, change):
    before = key(files, cache)
    change(files / "b.txt")
    reads: list[int] = []
    assert key(files, cache, reads) == corpus_of(files).fingerprint != before
    assert reads


def test_what_else_decides_the_documents_is_part_of_the_state(files, cache, monkeypatch):
    """The separator, and the code that reads."""
    whole = key(files, cache)
    split = key_of(text_files(f"{files}/*.txt", separator="of a"), cache)
    assert split == text_files(f"{files}/*.txt", separator="of a").fingerprint != whole
    monkeypatch.setattr(cache_module, "_code", lambda: "other code")
    reads: list[int] = []
    assert key(files, cache, reads) == whole
    assert reads


def test_files_that_changed_just_now_are_read_again(files, cache, monkeypatch):
    """Within two seconds, a second change can have the same time as the first."""
    monkeypatch.setattr(cache_module, "SETTLED_AFTER_NS", 3600 * 10**9)
    key(files, cache)
    reads: list[int] = []
    key(files, cache, reads)
    assert reads
    assert not [*cache.glob("corpus-*")]


@pytest.mark.parametrize("damage", [lambda data: data[:10], lambda data: data.replace(b"0", b"1")])
def test_a_damaged_note_is_made_again(files, cache, damage):
    expected = key(files, cache)
    (note,) = cache.glob("corpus-*.json")
    before = note.read_bytes()
    note.write_bytes(damage(before))
    assert zlib.crc32(note.read_bytes()) != zlib.crc32(before)
    reads: list[int] = []
    assert key(files, cache, reads) == expected
    assert reads
    assert note.read_bytes() == before


def test_what_was_said_of_the_files_is_said_at_each_start(files, cache, caplog):
    (files / "b.txt").write_text("one\n<|endoftext|>\ntwo\n" * 9)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            key(files, cache)
        assert sum("'<|endoftext|>' at ends of lines" in text for text in caplog.messages) == 1


def test_trials_that_start_at_once_read_once(files, cache):
    """The others wait for the first."""
    reads: list[int] = []
    start = threading.Barrier(4)

    def trial(_):
        corpus = corpus_of(files, reads)
        start.wait()
        return key_of(corpus, cache)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(trial, range(4)))) == 1
    assert len(reads) == 1


def test_a_cache_that_may_not_be_written_serves(files, cache, monkeypatch):
    def refuse(*_, **__):
        raise cache_module.StoreError("no room")

    monkeypatch.setattr(cache_module, "write_atomically", refuse)
    assert key(files, cache) == corpus_of(files).fingerprint


def test_python_source_is_known_by_its_files_too(tmp_path, cache):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.py").write_text("x = 1\n")
    key_of(python_source(tmp_path / "source"), cache)
    reads: list[int] = []
    again = replace(python_source(tmp_path / "source"), read=lambda: reads.append(1) or [])
    assert key_of(again, cache) == python_source(tmp_path / "source").fingerprint
    assert not reads
