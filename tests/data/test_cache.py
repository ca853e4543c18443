import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from nerve.data import cache as cache_module
from nerve.data import cache_entry as entry_module
from nerve.data import tokenizer as tokenizer_module
from nerve.data.cache import cache_root, cached_tokens
from nerve.data.cache_entry import TokenCache
from nerve.data.corpus import Corpus, validation_digests
from nerve.data.tokenizer import SEPARATORS, TokenizerSpec, train_tokenizer
from nerve.errors import DataError

SPEC = TokenizerSpec(vocab_size=300)


@pytest.fixture
def opened(small_corpus, tmp_path) -> TokenCache:
    return cached_tokens(small_corpus, SPEC, 0.2, tmp_path)


def fail_to_build(*_):
    raise AssertionError("built again")


def entries(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.suffix != ".lock"]


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def without_locks(*_):
    raise OSError(errno.ENOLCK, "no locks here")


def test_the_streams_are_the_documents_of_their_split_in_order_each_with_a_separator(
    opened, small_corpus
):
    validation = validation_digests(small_corpus.hashes, 0.2)
    tokenizer = opened.tokenizer
    separator = tokenizer.token_to_id(SEPARATORS[0])
    for tokens, in_validation in ((opened.train.all(), False), (opened.val.all(), True)):
        documents = np.split(tokens, np.flatnonzero(tokens == separator) + 1)
        texts = [tokenizer.decode(document[:-1].tolist()) for document in documents[:-1]]
        assert texts == [
            document.text
            for document, (digest, _) in zip(
                small_corpus.documents(), small_corpus.hashes, strict=True
            )
            if (digest in validation) == in_validation
        ]
        assert len(documents[-1]) == 0


def test_the_tokenizer_is_trained_on_the_training_split_only(opened, small_corpus):
    validation = validation_digests(small_corpus.hashes, 0.2)
    texts = [
        document.text
        for document, (digest, _) in zip(small_corpus.documents(), small_corpus.hashes, strict=True)
        if digest not in validation
    ]
    assert train_tokenizer(texts, 300).to_str() == opened.tokenizer.to_str()


@pytest.mark.parametrize("sample_bytes", [500, 3000, 5_001])
def test_a_tokenizer_is_trained_on_a_sample_of_that_many_bytes_of_the_training_split(
    small_corpus, tmp_path, monkeypatch, caplog, sample_bytes
):
    caplog.set_level(logging.INFO)
    seen: list[str] = []

    def train(texts, *arguments):
        seen[:] = texts
        return train_tokenizer(seen, *arguments)

    monkeypatch.setattr(tokenizer_module, "train_tokenizer", train)
    spec = TokenizerSpec(300, sample_bytes=sample_bytes)
    opened = cached_tokens(small_corpus, spec, 0.2, tmp_path)
    assert sample_bytes - 3 <= sum(len(text.encode()) for text in seen) <= sample_bytes
    validation = validation_digests(small_corpus.hashes, 0.2)
    training = [
        document.text
        for document, (digest, _) in zip(small_corpus.documents(), small_corpus.hashes, strict=True)
        if digest not in validation
    ]
    assert all(any(text.startswith(one) for text in training) for one in seen)
    assert f"on {sample_bytes / 1e6:.0f} MB of the" in caplog.text
    first = [*seen]
    cached_tokens(small_corpus, spec, 0.2, tmp_path / "again")
    assert seen == first
    assert opened.meta.n_train_tokens > 0


def test_a_sample_as_large_as_the_training_split_is_all_of_it(opened, small_corpus, tmp_path):
    everything = TokenizerSpec(300, sample_bytes=10**6)
    entry = cached_tokens(small_corpus, everything, 0.2, tmp_path)
    assert entry.path != opened.path
    assert entry.tokenizer.to_str() == opened.tokenizer.to_str()


def test_the_counts_are_those_of_the_tokens_and_the_texts(opened, small_texts):
    expected = np.bincount(opened.train.all(), minlength=opened.meta.vocab_size)
    np.testing.assert_array_equal(opened.train_counts, expected)
    assert opened.meta.n_documents == len(small_texts)
    assert opened.meta.n_bytes == sum(len(text.encode()) for text in small_texts)
    assert opened.meta.n_train_tokens == len(opened.train)
    assert opened.meta.n_val_tokens == len(opened.val)


def test_a_second_call_opens_what_the_first_built(opened, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "build_entry", fail_to_build)
    again = cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert again.meta == opened.meta
    np.testing.assert_array_equal(again.train.all(), opened.train.all())
    np.testing.assert_array_equal(again.val.all(), opened.val.all())


def test_corpus_tokenizer_and_split_each_have_an_entry_of_their_own(
    opened, small_corpus, make_corpus, tmp_path
):
    cached_tokens(small_corpus, TokenizerSpec(vocab_size=301), 0.2, tmp_path)
    cached_tokens(small_corpus, SPEC, 0.3, tmp_path)
    cached_tokens(make_corpus(["one", "two"]), SPEC, 0.2, tmp_path)
    path = tmp_path / "tokenizer.json"
    opened.tokenizer.save(str(path))
    cached_tokens(small_corpus, TokenizerSpec(path=path), 0.2, tmp_path)
    path.unlink()
    assert len(entries(tmp_path)) == 5


def test_tokens_are_read_only_maps(opened):
    assert isinstance(opened.train.all(), np.memmap)
    assert opened.train.all().dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        opened.train.all()[0] = 1


def test_a_vocabulary_past_16_bits_is_stored_in_32(opened, small_corpus, tmp_path):
    specification = json.loads(opened.tokenizer.to_str())
    specification["model"]["vocab"]["ĠhugeĠ"] = 70_000
    path = tmp_path / "huge.json"
    path.write_text(json.dumps(specification))
    entry = cached_tokens(small_corpus, TokenizerSpec(path=path), 0.2, tmp_path)
    assert entry.train.all().dtype == np.uint32
    np.testing.assert_array_equal(entry.train.all(), opened.train.all())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def cut_vocabulary(path: Path) -> None:
    specification = json.loads(path.read_text())
    last = max(specification["model"]["vocab"], key=specification["model"]["vocab"].get)
    del specification["model"]["vocab"][last]
    specification["model"]["merges"].pop()
    path.write_text(json.dumps(specification))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train.tokens", truncate),
        ("val.tokens", Path.unlink),
        ("counts.npy", truncate),
        ("meta.json", Path.unlink),
        ("meta.json", truncate),
        ("meta.json", lambda path: path.write_text('{"corpus": "only"}')),
        ("tokenizer.json", cut_vocabulary),
        ("tokenizer.json", truncate),
    ],
)
def test_a_damaged_entry_is_built_again(opened, small_corpus, tmp_path, name, damage):
    before = {path.name: path.read_bytes() for path in opened.path.iterdir()}
    damage(opened.path / name)
    again = cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert {path.name: path.read_bytes() for path in again.path.iterdir()} == before
    assert entries(tmp_path) == [opened.path.name]


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def flip_one_bit(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


def swap_halves(data: bytes) -> bytes:
    half = len(data) // 4 * 2
    return data[half : 2 * half] + data[:half] + data[2 * half :]


FILES = ("train.tokens", "val.tokens", "counts.npy", "tokenizer.json", "meta.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [zeros, flip_one_bit, swap_halves])
def test_an_entry_whose_bytes_changed_at_the_same_size_is_built_again_and_that_is_said(
    opened, small_corpus, tmp_path, caplog, name, change
):
    path = opened.path / name
    before = path.read_bytes()
    path.write_bytes(change(before))
    cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert path.read_bytes() == before
    assert f"{opened.path} is damaged" in caplog.text
    assert name in caplog.text


def test_a_build_that_fails_leaves_no_entry(small_corpus, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(entry_module, "_write_tokens", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert entries(tmp_path) == []
    assert len(cached_tokens(small_corpus, SPEC, 0.2, tmp_path).train) > 0


def test_a_damaged_entry_that_another_process_repaired_meanwhile_is_kept(
    opened, small_corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr(fcntl, "flock", without_locks)  # else they would wait for each other
    truncate(opened.path / "train.tokens")
    build = cache_module.build_entry

    def build_after_another(building, *arguments):
        build(building, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "build_entry", build)
            cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
        (opened.path / "mark").touch()

    monkeypatch.setattr(cache_module, "build_entry", build_after_another)
    cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert (opened.path / "mark").exists()
    assert entries(tmp_path) == [opened.path.name]


def test_who_comes_while_another_builds_waits_and_takes_its_entry(
    small_corpus, tmp_path, monkeypatch, caplog
):
    build, built = cache_module.build_entry, []

    def build_once_another_waits(building, *arguments):
        built.append(building)
        wait_until(lambda: "waiting for it" in caplog.text)
        build(building, *arguments)

    def get() -> TokenCache:
        return cached_tokens(small_corpus, SPEC, 0.2, tmp_path)

    monkeypatch.setattr(cache_module, "build_entry", build_once_another_waits)
    caplog.set_level(logging.INFO)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(get)
        wait_until(lambda: built)
        second = pool.submit(get)
        entries_got = [first.result(timeout=100), second.result(timeout=100)]
    assert len(built) == 1
    assert caplog.text.count(f"tokenizing {small_corpus.name}, once") == 1
    np.testing.assert_array_equal(entries_got[0].train.all(), entries_got[1].train.all())


BUILD_WITH_ANOTHER = """
import errno, fcntl, sys, time
from pathlib import Path
from nerve.data import cache
from nerve.data.corpus import Corpus, Document
from nerve.data.tokenizer import TokenizerSpec

root, me, other = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
publish = cache._publish

def without_locks(*_):
    raise OSError(errno.ENOLCK, "no locks here")

def publish_with_the_other(building, path):
    (root / me).touch()
    deadline = time.monotonic() + 100
    while not (root / other).exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    publish(building, path)

fcntl.flock = without_locks
cache._publish = publish_with_the_other
documents = [Document(str(i), f"document {i} " * 50) for i in range(20)]
entry = cache.cached_tokens(Corpus("c", lambda: documents), TokenizerSpec(300), 0.2, root / "cache")
print(entry.train.all().sum(), entry.meta.tokenizer_fingerprint)
"""


def test_without_locks_two_processes_that_build_at_once_leave_one_good_entry(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD_WITH_ANOTHER, str(tmp_path), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in (("a", "b"), ("b", "a"))
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0] == outputs[1]
    assert len(entries(tmp_path / "cache")) == 1


def test_the_root_is_the_argument_else_the_environment_else_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NERVE_CACHE", "/n")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    assert cache_root(tmp_path) == tmp_path
    assert cache_root("~/c") == Path("/h/c")
    assert cache_root("c") == Path.cwd() / "c"
    assert cache_root() == Path("/n")
    monkeypatch.setenv("NERVE_CACHE", "~/n")
    assert cache_root() == Path("/h/n")
    monkeypatch.delenv("NERVE_CACHE")
    assert cache_root() == Path("/x/nerve")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path("/h/.cache/nerve")


def test_a_root_that_cannot_be_written_is_an_error_that_names_it(small_corpus, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"must be writable; .*file/cache.*NERVE_CACHE"):
        cached_tokens(small_corpus, SPEC, 0.2, tmp_path / "file" / "cache")


def test_an_unreadable_corpus_is_reported_as_such_not_as_a_cache_failure(tmp_path):
    def read():
        raise DataError("the corpus is at fault")

    with pytest.raises(DataError, match="the corpus is at fault"):
        cached_tokens(Corpus("c", read), SPEC, 0.2, tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o027])
def test_modes_of_an_entry_follow_the_umask(small_corpus, tmp_path, umask):
    before = os.umask(umask)
    try:
        entry = cached_tokens(small_corpus, SPEC, 0.2, tmp_path / "cache")
    finally:
        os.umask(before)
    folders = [tmp_path / "cache", entry.path]
    assert [path.stat().st_mode & 0o777 for path in folders] == [0o777 & ~umask] * 2
    files = [*entry.path.iterdir(), *(tmp_path / "cache").glob(".*.lock")]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


def leftover(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "train.tokens").write_bytes(b"half of it")
    return folder


@pytest.fixture
def key(small_corpus, tmp_path) -> str:
    return cached_tokens(small_corpus, SPEC, 0.2, tmp_path / "elsewhere").path.name


@pytest.mark.parametrize(
    "name", [".building-0a1b2c3d", ".building-q1w2e3r4", ".damaged-0a1b2c3d", ".damaged-x1y2z3"]
)
def test_what_dead_builds_left_is_removed_at_the_next_build(small_corpus, tmp_path, key, name):
    """From this and earlier versions, for the same entry or another one."""
    left = leftover(tmp_path / "cache" / name)
    cached_tokens(small_corpus, SPEC, 0.2, tmp_path / "cache")
    assert not left.exists()
    assert entries(tmp_path / "cache") == [key]


def test_the_build_of_a_living_process_is_left_alone(small_corpus, tmp_path):
    left = leftover(tmp_path / ".building-0a1b2c3d")
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert left.exists()
    os.close(descriptor)
    cached_tokens(small_corpus, SPEC, 0.3, tmp_path)
    assert not left.exists()


def test_a_lock_that_another_user_made_is_waited_for_all_the_same(
    small_corpus, tmp_path, monkeypatch, key
):
    """It can be opened for reading, which is enough to lock it."""
    refused = []

    def open_to_read(path, mode="r", **options):
        if str(path).endswith(".lock") and "a" in mode:
            refused.append(path)
            raise PermissionError(errno.EACCES, "not yours")
        return open(path, mode, **options)

    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{key}.lock").touch(mode=0o444)
    monkeypatch.setattr(cache_module, "open", open_to_read, raising=False)
    locked = []
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: locked.append(arguments))
    cached_tokens(small_corpus, SPEC, 0.2, tmp_path / "cache")
    assert refused
    assert locked


def test_an_entry_that_may_not_be_read_is_refused_and_left_where_it_is(
    opened, small_corpus, tmp_path, monkeypatch
):
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.parent == opened.path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=rf"{opened.path} belongs to another user .*NERVE_CACHE"):
        cached_tokens(small_corpus, SPEC, 0.2, tmp_path)
    assert entries(tmp_path) == [opened.path.name]
