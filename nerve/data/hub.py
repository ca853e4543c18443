"""Datasets from the Hugging Face hub as a corpus or as images, using the package `datasets`."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from nerve.config import require
from nerve.data.corpus import Corpus, Document
from nerve.data.extras import import_extra
from nerve.data.image_sets import ImageSet, LabeledImages
from nerve.errors import DataError
from nerve.files import absolute


def hub_dataset(
    path: str,
    *,
    n_documents: int,
    name: str | None = None,
    split: str = "train",
    text_column: str = "text",
    revision: str | None = None,
) -> Corpus:
    """The first `n_documents` rows of a dataset, streamed once, when the token cache is built.

    Later starts find the cache by these arguments and need no network. The cache of a folder, whose
    files may change, is found by the rows themselves. To make sure that two machines get the same
    rows, pass a commit as `revision`; the run's record contains a fingerprint of the rows in any
    case.

    Args:
        path: the dataset's name on the hub, or a folder of data files.
        n_documents: number of rows; they are kept in memory if the cache has to be built.
        name: the dataset's configuration, if it has several.
        split: the split of the dataset.
        text_column: the column with the text.
        revision: a commit, tag or branch of the dataset.

    Raises:
        ConfigError: for `n_documents` below 2 (one per split).
    """
    require(n_documents >= 2, f"data.corpus.n_documents must be at least 2; got {n_documents}.")
    arguments = {"path": _source(path), "name": name, "split": split, "revision": revision}

    @cache
    def read() -> list[Document]:
        rows = islice(_stream(arguments), n_documents)
        return [
            Document(f"{path}:{i}", _text(row, text_column, path)) for i, row in enumerate(rows)
        ]

    if absolute(path).is_dir():
        return Corpus(f"hub:{path}", read)
    request = {**arguments, "text_column": text_column, "n_documents": n_documents}
    return Corpus(f"hub:{path}", read, request=f"hub:{json.dumps(request, sort_keys=True)}")


def hub_images(
    path: str,
    *,
    n_classes: int,
    image_column: str = "image",
    label_column: str = "label",
    flips: bool = True,
    revision: str | None = None,
) -> ImageSet:
    """The splits `train` and `test` of a dataset of labeled images, which are kept in memory.

    Args:
        path: the dataset's name on the hub, or a folder of data files.
        n_classes: labels are 0 to `n_classes` - 1.
        image_column: the column of images, all of the same size and RGB.
        label_column: the column of labels.
        flips: whether training may mirror images.
        revision: a commit, tag or branch of the dataset.
    """

    source = _source(path)

    def split_of(split: str) -> LabeledImages:
        rows = list(_stream({"path": source, "split": split, "revision": revision}))
        for column in (image_column, label_column):
            if not rows or column not in rows[0]:
                raise DataError(
                    f"Split {split} of {path!r} must have rows with a column {column!r}; its "
                    f"columns are {', '.join(map(repr, rows[0] if rows else ()))}. Set "
                    "image_column and label_column to two of them."
                )
        images = [np.asarray(row[image_column], dtype=np.uint8) for row in rows]
        shapes = sorted({image.shape for image in images})
        if len(shapes) > 1 or len(shapes[0]) != 3 or shapes[0][-1] != 3:  # gray, RGBA, CMYK
            raise DataError(
                f"The images of a dataset must be RGB and of one size; {path!r} has the shapes "
                f"{', '.join(map(str, shapes[:3]))}{', …' if len(shapes) > 3 else ''} in split "
                f"{split}. Convert them, or choose another dataset."
            )
        labels = np.array([row[label_column] for row in rows], dtype=np.int64)
        return LabeledImages(np.stack(images).transpose(0, 3, 1, 2), labels)

    return ImageSet(
        f"hub:{path}", n_classes, flips, read=lambda: (split_of("train"), split_of("test"))
    )


def _source(path: str) -> str:
    """The absolute path of a dataset that is a folder, or its name on the hub."""
    folder = absolute(path)
    return str(folder) if folder.is_dir() else path


def _stream(arguments: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    datasets = import_extra("datasets", "hub", "A dataset from the hub")
    try:
        yield from datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # the library's many readers can raise anything
        raise DataError(
            f"The dataset {arguments['path']!r} must be readable with datasets.load_dataset; "
            f"{arguments} raised {type(error).__name__}: {error}. Check the network and the names "
            "of the dataset, the configuration and the split."
        ) from error


def _text(row: dict[str, Any], text_column: str, path: str) -> str:
    if not isinstance(row.get(text_column), str):
        raise DataError(
            f"data.corpus.text_column must be a column of strings; {path!r} has no text in "
            f"{text_column!r}; its columns are {', '.join(map(repr, row))}. Set "
            "data.corpus.text_column to the column with the text."
        )
    return row[text_column]
