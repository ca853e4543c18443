"""Datasets of the Hugging Face hub as a corpus, through the package `datasets`."""

import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

from nerve.data.corpus import Corpus, Document
from nerve.data.extras import import_extra
from nerve.errors import DataError
from nerve.values import require


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

    Later starts find the cache by these arguments and need no network. To be sure that two
    machines get the same rows, give a commit as `revision`; the run's record holds a fingerprint
    of the rows themselves in any case.

    Args:
        path: the dataset's name on the hub, or a folder of data files.
        n_documents: rows to take; they are kept in memory once the cache had to be built.
        name: the dataset's configuration, where it has several.
        split: the part of the dataset.
        text_column: the column that holds the text.
        revision: a commit, tag or branch of the dataset.

    Raises:
        ConfigError: for `n_documents` below 2 (one a split).
    """
    require(n_documents >= 2, f"data n_documents must be at least 2; got {n_documents}.")
    arguments = {"path": path, "name": name, "split": split, "revision": revision}

    @cache
    def read() -> list[Document]:
        rows = islice(_stream(arguments), n_documents)
        return [
            Document(f"{path}:{i}", _text(row, text_column, path)) for i, row in enumerate(rows)
        ]

    request = {**arguments, "text_column": text_column, "n_documents": n_documents}
    return Corpus(f"hub:{path}", read, request=f"hub:{json.dumps(request, sort_keys=True)}")


def _stream(arguments: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    datasets = import_extra("datasets", "hub", "A dataset of the hub")
    try:
        yield from datasets.load_dataset(**arguments, streaming=True)
    except Exception as error:  # the library raises whatever its many readers and servers do
        raise DataError(
            f"The dataset {arguments['path']!r} must be readable through datasets.load_dataset; "
            f"{arguments} gave {type(error).__name__}: {error}. Check the network and the names "
            "of dataset, configuration and split."
        ) from error


def _text(row: dict[str, Any], text_column: str, path: str) -> str:
    if not isinstance(row.get(text_column), str):
        raise DataError(
            f"text_column must be a column of texts; {path!r} has no texts in {text_column!r}; its "
            f"columns are {', '.join(map(repr, row))}. Set text_column to one of them."
        )
    return row[text_column]
