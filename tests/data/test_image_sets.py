import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from archives import unpack

from nerve.data.image_sets import cifar100, digits
from nerve.errors import ConfigError, DataError


class Python2Pickler(pickle._Pickler):
    """Writes byte and text strings like Python 2, with which CIFAR-100 was pickled."""

    def save_string(self, string):
        data = string.encode() if isinstance(string, str) else string
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(string)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string, str: save_string}


def python2_pickle(content) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def content(n: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        b"filenames": [b"a.png"] * n,
        b"coarse_labels": [0] * n,
        b"fine_labels": rng.integers(100, size=n).tolist(),
        b"data": rng.integers(256, size=(n, 3072), dtype=np.uint8),
    }


def write_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def archive(tmp_path) -> Path:
    files = {
        "cifar-100-python/train": python2_pickle(content(20, seed=1)),
        "cifar-100-python/test": python2_pickle(content(7, seed=2)),
    }
    return write_archive(tmp_path / "cifar-100-python.tar.gz", files)


def test_digits_are_held_out_class_by_class_every_fifth():
    train, test = digits().read()
    assert len(train.labels) + len(test.labels) == 1797
    for split in (train, test):
        assert split.images.shape == (len(split.labels), 1, 8, 8)
        assert split.images.dtype == np.uint8
        assert split.images.max() == 16
    counts = [np.bincount(split.labels, minlength=10) for split in (train, test)]
    np.testing.assert_array_equal(counts[1], np.ceil((counts[0] + counts[1]) / 5))


def test_digits_keep_every_image_with_its_label():
    """Compared with scikit-learn's own arrays, as sets of (image, label)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    expected = sorted(zip(map(bytes, bunch.images.astype(np.uint8)), bunch.target, strict=True))
    found = [
        (image.tobytes(), label)
        for split in digits().read()
        for image, label in zip(*split, strict=True)
    ]
    assert sorted(found) == [(image, label) for image, label in expected]


def test_without_scikit_learn_the_error_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r'package sklearn.*pip install .*"\.\[images\]"'):
        digits().read()


def test_cifar_is_read_from_the_archive_and_from_its_folder(archive, tmp_path):
    unpack(archive, tmp_path)
    for path in (archive, str(tmp_path / "cifar-100-python")):
        train, test = cifar100(path).read()
        for split, (n, seed) in ((train, (20, 1)), (test, (7, 2))):
            np.testing.assert_array_equal(split.images.reshape(n, -1), content(n, seed)[b"data"])
            assert split.labels.tolist() == content(n, seed)[b"fine_labels"]
            assert split.images.shape == (n, 3, 32, 32)


def test_a_pickle_of_python_3_is_read_too(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content(3)))
    assert cifar100(tmp_path).read()[0].images.shape == (3, 3, 32, 32)


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    mark = tmp_path / "mark"
    pickled = pickle.dumps({**content(3), b"meta": Attack(mark)})
    files = {f"cifar-100-python/{name}": pickled for name in ("train", "test")}
    path = write_archive(tmp_path / "c.tar.gz", files)
    with pytest.raises(DataError, match=r"c\.tar\.gz.*posix\.mkdir may not be loaded"):
        cifar100(path).read()
    assert not mark.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_an_archive_that_is_cut_off_is_named_with_the_download(archive, kept):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(
        DataError, match=r"(?s)python\.tar\.gz is damaged .*Download it again from http"
    ):
        cifar100(archive).read()


def test_an_archive_with_a_damaged_middle_is_named(archive):
    data = bytearray(archive.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    archive.write_bytes(data)
    with pytest.raises(DataError, match=r"(?s)python\.tar\.gz is damaged .*Download it again"):
        cifar100(archive).read()


def test_an_archive_of_something_else_is_named_with_what_is_missing(tmp_path):
    path = write_archive(tmp_path / "cifar-10.tar.gz", {"cifar-10-batches-py/test_batch": b""})
    with pytest.raises(DataError, match=r"cifar-10\.tar\.gz does not .*cifar-100-python/train"):
        cifar100(path).read()


def test_a_missing_file_is_an_error_with_the_download(tmp_path):
    with pytest.raises(DataError, match=r"no file .*absent\.tar\.gz. Download it from http"):
        cifar100(tmp_path / "absent.tar.gz").read()


def test_a_folder_without_the_files_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"must contain the files train and test.*No such file"):
        cifar100(tmp_path).read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": np.zeros((3, 10), np.uint8)}, r"uint8 \(3, 10\) for 3 labels"),
        ({b"data": np.zeros((3, 3072))}, "data is float64"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, r"\(2, 3072\) for 3 labels"),
        ({b"fine_labels": [0, 1, 100]}, "labels range from 0 to 100"),
        ({b"fine_labels": None}, "TypeError"),
    ],
)
def test_contents_that_are_not_cifar_are_errors_that_say_why(tmp_path, change, message):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps(content(3) | change))
    with pytest.raises(DataError, match=message):
        cifar100(tmp_path).read()


@pytest.mark.parametrize(
    "pickled", [b"", b"no pickle", pickle.dumps([1]), pickle.dumps(content(3))[:99]]
)
def test_files_that_are_no_pickles_of_a_dictionary_are_errors(tmp_path, pickled):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickled)
    with pytest.raises(DataError, match="damaged or another data set"):
        cifar100(tmp_path).read()


@pytest.mark.parametrize("start", ["~", "."])
def test_the_archive_of_cifar_begins_at_home_or_where_it_was_given(tmp_path, monkeypatch, start):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    images = cifar100(f"{start}/cifar.tar.gz")
    monkeypatch.chdir("/")
    with pytest.raises(DataError, match=f"no file {tmp_path}/cifar.tar.gz"):
        images.read()


def test_digits_may_be_split_the_other_way_round():
    train, test = digits().read()
    few, many = digits(reversed=True).read()
    np.testing.assert_array_equal(few.images, test.images)
    np.testing.assert_array_equal(few.labels, test.labels)
    np.testing.assert_array_equal(many.images, train.images)
    assert (len(few.labels), len(many.labels)) == (364, 1433)
    assert (digits().name, digits(reversed=True).name) == ("digits", "digits_reversed")


@pytest.mark.parametrize("value", [None, "true", 1])
def test_which_way_digits_are_split_is_true_or_false(value):
    with pytest.raises(ConfigError, match=r"data\.images\.reversed must be true or false"):
        digits(reversed=value)
