"""A file is its old self or its new self, never in between, and nothing is left beside it."""

import os

import pytest

from nerve.errors import StoreError
from nerve.files import remove_temporaries, write_atomically


def test_the_temporary_file_is_hidden_and_of_another_suffix(tmp_path):
    """A reader that looks while the file is being written finds the old one alone."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        (other,) = set(os.listdir(tmp_path)) - {"a.parquet"}
        assert other.startswith(".")
        assert not other.endswith(".parquet")
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.parquet"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_any_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"ne")
        raise error("w")

    with pytest.raises(StoreError if error is OSError else error):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.parquet"]


def test_content_is_synced_before_the_move_and_the_directory_after(tmp_path, monkeypatch):
    """Otherwise a power cut could leave an empty file under the final name."""
    order = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        order.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), real_replace(*a)))
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert order == ["file", "replace", "directory"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StoreError, match="gone"):
        write_atomically(tmp_path / "gone" / "a", lambda file: None)


def test_only_temporaries_are_removed(tmp_path):
    for name in (".a.parquet.12ab.tmp", "a.tmp", ".hidden", "a.parquet"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.parquet", "a.tmp"]
