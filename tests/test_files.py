"""A file has its old or its new content, never a mixture, and no other files remain."""

import errno
import fcntl
import logging
import os
import time

import pytest
import support

from nerve.errors import StoreError
from nerve.files import _say_once, building_folder, remove_temporaries, write_atomically


@pytest.fixture(autouse=True)
def _synced(monkeypatch):
    """What other tests do without."""
    monkeypatch.setattr(os, "fsync", support.sync)


def test_the_temporary_file_is_hidden_and_of_another_suffix(tmp_path):
    """A reader that looks while the file is being written finds only the old one."""
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
    """Otherwise a power failure could leave an empty file under the final name."""
    order = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor):
        order.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), real_replace(*a)))
    write_atomically(tmp_path / "a", lambda file: file.write(b"x"))
    assert order == ["file", "replace", "directory"]


@pytest.mark.parametrize("code", ["EINVAL", "EOPNOTSUPP", "ENOSYS", "EBADF"])
def test_a_directory_that_cannot_be_synced_is_said_once_and_keeps_no_file_from_being_written(
    tmp_path, monkeypatch, caplog, code
):
    """As on CIFS and FUSE: the file is written nevertheless."""
    real = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(getattr(errno, code), code)
        real(descriptor)

    check_written(tmp_path, monkeypatch, caplog, refuse)
    assert caplog.text.count("does not sync directories") == 1


@pytest.mark.parametrize("code", ["EINVAL", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_that_cannot_be_synced_is_written_all_the_same(tmp_path, monkeypatch, caplog, code):
    def refuse(descriptor):
        raise OSError(getattr(errno, code), code)

    check_written(tmp_path, monkeypatch, caplog, refuse)
    assert caplog.text.count("does not sync files") == 1


def check_written(folder, monkeypatch, caplog, fsync):
    _say_once.cache_clear()
    monkeypatch.setattr(os, "fsync", fsync)
    with caplog.at_level(logging.WARNING):
        for content in (b"a", b"b"):
            write_atomically(folder / "a", lambda file, content=content: file.write(content))
    assert (folder / "a").read_bytes() == b"b"
    assert os.listdir(folder) == ["a"]


@pytest.mark.parametrize("code", ["EACCES", "EPERM", "EISDIR"])
def test_a_directory_that_cannot_be_opened_is_not_synced(tmp_path, monkeypatch, caplog, code):
    """A directory with write permission but no read permission."""
    real = os.open

    def refuse(path, *args):
        if path == tmp_path:
            raise OSError(getattr(errno, code), code)
        return real(path, *args)

    monkeypatch.setattr(os, "open", refuse)
    check_written(tmp_path, monkeypatch, caplog, os.fsync)


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_sync_that_fails_is_no_sync_that_is_not_supported(tmp_path, monkeypatch, code):
    def refuse(descriptor):
        raise OSError(getattr(errno, code), code)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StoreError, match=code):
        write_atomically(tmp_path / "a", lambda file: file.write(b"x"))


def test_what_is_built_is_removed_and_so_is_what_the_dead_left(tmp_path):
    """The folder of a live writer stays."""
    (tmp_path / ".new-dead" / "deep").mkdir(parents=True)
    (tmp_path / ".other").mkdir()
    with building_folder(tmp_path, ".new-") as mine:
        (mine / "half").write_text("")
        with building_folder(tmp_path, ".new-") as its:
            assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".other", mine, its])
        assert (mine / "half").exists()
    assert os.listdir(tmp_path) == [".other"]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_who_may_read_what_is_built_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with building_folder(tmp_path, ".new-") as folder:
            assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
    finally:
        os.umask(before)


@pytest.mark.parametrize(("age_s", "is_left"), [(3600, True), (2 * 24 * 3600, False)])
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EBADF])
def test_where_no_lock_tells_a_writer_is_dead_after_a_day(
    tmp_path, monkeypatch, code, age_s, is_left
):
    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".new-dead").mkdir()
    (tmp_path / ".new-dead" / "half").write_text("")
    for path in (tmp_path / ".new-dead" / "half", tmp_path / ".new-dead"):
        os.utime(path, (time.time() - age_s,) * 2)
    with building_folder(tmp_path, ".new-"):
        assert (tmp_path / ".new-dead").exists() == is_left


def test_a_folder_at_work_for_days_is_alive_by_its_files_where_no_lock_tells(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".new-slow").mkdir()
    (tmp_path / ".new-slow" / "written").write_text("now")
    os.utime(tmp_path / ".new-slow", (0, 0))
    with building_folder(tmp_path, ".new-"):
        assert (tmp_path / ".new-slow").exists()


def test_a_folder_that_another_took_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Between its creation and its lock."""
    removed = []

    def lose_the_first(descriptor, operation):
        if not removed:
            [folder] = tmp_path.iterdir()
            folder.rmdir()
            removed.append(folder)

    monkeypatch.setattr(fcntl, "flock", lose_the_first)
    with building_folder(tmp_path, ".new-") as folder:
        assert folder.is_dir()
        assert folder not in removed


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(StoreError, match="gone"):
        write_atomically(tmp_path / "gone" / "a", lambda file: None)


def test_only_temporaries_are_removed(tmp_path):
    for name in (".a.parquet.12ab.tmp", "a.tmp", ".hidden", "a.parquet"):
        (tmp_path / name).write_text("")
    remove_temporaries(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.parquet", "a.tmp"]
