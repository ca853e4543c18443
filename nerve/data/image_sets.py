"""Labeled images in memory: scikit-learn's digits and CIFAR-100 from its Python archive."""

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nerve.config import require_type
from nerve.data.extras import import_extra
from nerve.errors import DataError
from nerve.files import absolute

_CIFAR_FOLDER = "cifar-100-python"
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"

_RECONSTRUCT = np.empty(0).__reduce__()[0]
_LOADABLE: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # its name in NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
}


class LabeledImages(NamedTuple):
    """`images` uint8 `[n, channels, height, width]` and `labels` int64 `[n]`."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSet:
    """A named set of labeled images with a fixed split.

    Args:
        name: for messages and the run's record.
        n_classes: labels are 0 to `n_classes` - 1.
        flips: whether training may mirror images (not for digits).
        read: returns the training and the test images.
    """

    name: str
    n_classes: int
    flips: bool
    read: Callable[[], tuple[LabeledImages, LabeledImages]]


def digits(reversed: bool = False) -> ImageSet:
    """1,797 handwritten digits of 8 × 8 pixels, 0 to 16 (Alpaydin & Kaynak 1998), 10 classes.

    Every fifth image of each class is held out, so that the test set has all classes in equal
    shares and is the same for every seed. Reading them requires scikit-learn, which ships the
    images.

    Args:
        reversed: whether to train on that fifth, 364 images, and to test on the other 1,433, which
            makes the task hard enough to distinguish designs.

    Raises:
        ConfigError: for a value other than true or false.
    """
    require_type("data.images.reversed", reversed, bool)

    def read() -> tuple[LabeledImages, LabeledImages]:
        train, test = _read_digits()
        return (test, train) if reversed else (train, test)

    name = "digits_reversed" if reversed else "digits"
    return ImageSet(name, n_classes=10, flips=False, read=read)


def cifar100(path: str | Path) -> ImageSet:
    """CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 images of 32 × 32 pixels, 100 fine classes.

    Args:
        path: `cifar-100-python.tar.gz` as published by its authors, or the folder in it. Only
            NumPy arrays and plain containers are loaded from its pickles.
    """
    where = absolute(path)
    return ImageSet("cifar100", n_classes=100, flips=True, read=lambda: _read_cifar100(where))


def _read_digits() -> tuple[LabeledImages, LabeledImages]:
    datasets = import_extra("sklearn.datasets", "images", "The data set digits")
    bunch = datasets.load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    rank_in_class = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rank_in_class[labels == label] = np.arange(np.sum(labels == label))
    test = rank_in_class % 5 == 0
    return LabeledImages(images[~test], labels[~test]), LabeledImages(images[test], labels[test])


def _read_cifar100(path: Path) -> tuple[LabeledImages, LabeledImages]:
    files = _cifar_folder(path) if path.is_dir() else _cifar_archive(path)
    return _cifar_images(files["train"], path), _cifar_images(files["test"], path)


def _cifar_folder(path: Path) -> dict[str, bytes]:
    try:
        return {name: (path / name).read_bytes() for name in ("train", "test")}
    except OSError as error:
        raise DataError(
            f"The CIFAR-100 folder must contain the files train and test; {path} does not "
            f"({error.strerror}: {error.filename}). Pass the folder {_CIFAR_FOLDER}, or the "
            "archive itself."
        ) from error


def _cifar_archive(path: Path) -> dict[str, bytes]:
    try:
        # Decompress to the end, where the checksum is; tarfile itself would stop before it.
        unpacked = io.BytesIO(gzip.decompress(path.read_bytes()))
        with tarfile.open(fileobj=unpacked) as archive:
            files = {}
            for name in ("train", "test"):
                member = archive.extractfile(f"{_CIFAR_FOLDER}/{name}")
                if member is None:
                    raise KeyError(f"{_CIFAR_FOLDER}/{name} is not a file")
                files[name] = member.read()
            return files
    except FileNotFoundError as error:
        raise DataError(
            f"CIFAR-100 is read from its archive; there is no file {path}. Download it from "
            f"{_CIFAR_URL}"
        ) from error
    except KeyError as error:
        raise DataError(
            f"The CIFAR-100 archive must contain {_CIFAR_FOLDER}/train and .../test; {path} does "
            f"not ({error.args[0]}). It is another file: download {_CIFAR_URL}"
        ) from error
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"The CIFAR-100 archive must be complete; {path} is damaged or truncated ({error}). "
            f"Download it again from {_CIFAR_URL}"
        ) from error


def _cifar_images(pickled: bytes, path: Path) -> LabeledImages:
    try:
        content = _ArrayUnpickler(io.BytesIO(pickled), encoding="bytes").load()
        data, labels = content[b"data"], np.asarray(content[b"fine_labels"], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3 * 32 * 32):
            raise ValueError(f"data is {data.dtype} {data.shape} for {len(labels)} labels")
        if labels.min() < 0 or labels.max() > 99:
            raise ValueError(f"labels range from {labels.min()} to {labels.max()}")
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(
            "The CIFAR-100 files must contain uint8 images of 3 × 32 × 32 with fine labels 0 to "
            f"99; one in {path} does not ({type(error).__name__}: {error}). It is damaged or "
            f"another data set: download {_CIFAR_URL}"
        ) from error
    return LabeledImages(data.reshape(-1, 3, 32, 32), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Loads NumPy arrays, bytes and containers, and rejects everything else, including any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _LOADABLE:
            raise pickle.UnpicklingError(f"{module}.{name} may not be loaded")
        return _LOADABLE[module, name]
