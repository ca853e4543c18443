"""A corpus of the user's text files."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from itertools import chain, islice
from pathlib import Path
from types import NoneType

from nerve.config import pasted, require, require_type
from nerve.data.corpus import Corpus, Document, log_once
from nerve.data.file_formats import CODECS, READERS, is_known, read_rows
from nerve.data.tokenizer import SEPARATORS
from nerve.errors import DataError
from nerve.files import absolute

_PART_CHARACTERS = 1 << 14  # some 5,000 tokens, so the separators between parts hardly matter


def text_files(
    paths: str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    separator: str | None = None,
) -> Corpus:
    """The documents of files, in the order of the files' paths.

    A file with the suffix `.txt`, `.md` or `.py`, or without one, is a single document, which must
    be UTF-8. In `.jsonl`, `.json` (lines, or an array) and `.parquet` files each row is a document,
    and rows without text are skipped. All formats except Parquet may be compressed (`.jsonl.gz`,
    `.txt.zst`). A document is split at each `separator`. If a file yields a single document of more
    than 16,384 characters, it is cut at line ends into several, so that one long text can be split
    into training and validation.

    Args:
        paths: files, or patterns in which `*` stands for part of a name and `**` for folders.
        text_column: the key or column with the text of a row; `meta.text` is `text` within `meta`.
        separator: the marker between documents, such as `<|endoftext|>`; None if there is none.

    Raises:
        ConfigError: for a separator that is empty or not a string.
        DataError: for a path or pattern that matches no file, and for another kind of file. Read
            errors, which name the file and the line or column, are raised when the corpus is used.
    """
    require_type("data.corpus.separator", separator, str, NoneType)
    require(separator != "", "data.corpus.separator must be null or a nonempty string; got ''.")
    given = [paths] if isinstance(paths, str | Path) else [*paths]
    files = sorted({Path(file) for path in given for file in _matches(absolute(path))})
    for file in files:
        if not is_known(file):
            raise DataError(
                f"A text file must be one of {', '.join(filter(None, READERS))}, or have no suffix "
                f"(all except .parquet may be followed by {' or '.join(CODECS)}); got {file}. "
                "Convert it, or use a narrower pattern, such as 'folder/**/*.txt'."
            )
    reader = _Reader(files, text_column, separator)
    return Corpus(
        "text_files:" + ",".join(map(str, given)),
        reader.documents,
        files=files,
        reading=f"text_files {[text_column, separator]}",
        messages=reader.messages,
    )


class _Reader:
    """Reads the documents of files repeatedly, but logs each message about them only once."""

    def __init__(self, files: Sequence[Path], text_column: str, separator: str | None) -> None:
        self._files = files
        self._base = os.path.commonpath([file.parent for file in files])
        self._text_column = text_column
        self._separator = separator
        self.messages: dict[str, int] = {}

    def documents(self) -> Iterator[Document]:
        for file in self._files:
            documents = self._with_text(file)
            if self._separator is None:
                documents = self._looking_for_markers(documents, file)
            else:
                documents = _split(documents, self._separator)
            yield from _cut_if_single(each for each in documents if each.text.strip())

    def _with_text(self, file: Path) -> Iterator[Document]:
        n_missing = 0
        name_of_file = file.relative_to(self._base).as_posix()
        for name, text in read_rows(file, name_of_file, self._text_column):
            if text is None:
                n_missing += 1
            else:
                yield Document(name, text)
        if n_missing:
            message = f"{n_missing} rows without text are left out of {file}"
            log_once(self.messages, message, logging.INFO)

    def _looking_for_markers(self, documents: Iterator[Document], file: Path) -> Iterator[Document]:
        for document in documents:
            for marker in _markers_in(document.text):
                log_once(
                    self.messages,
                    f"{file} has {marker!r} at ends of lines, which is read as text; if it "
                    f"separates documents, set {pasted('data.corpus.separator', marker)}",
                )
            yield document


def _matches(path: Path) -> list[str]:
    found = [str(path)] if path.is_file() else glob(str(path), recursive=True)
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        raise DataError(
            f"Each of data.corpus.paths must match at least one file; {str(path)!r} matches none. "
            "Check the path; for all text files below a folder, use 'folder/**/*.txt'."
        )
    return files


_AT_END_OF_LINE = {
    marker: re.compile(rf"^{re.escape(marker)}|{re.escape(marker)}\r?$", re.MULTILINE)
    for marker in SEPARATORS
}


def _markers_in(text: str) -> list[str]:
    """The known separators that begin or end a line of `text`."""
    return [
        marker
        for marker, pattern in _AT_END_OF_LINE.items()
        if marker in text and pattern.search(text)
    ]


def _split(documents: Iterable[Document], separator: str) -> Iterator[Document]:
    """The texts between the separators. A line end after a separator is not part of the text."""
    ends_line = separator.endswith("\n")
    for name, whole in documents:
        first, *others = whole.split(separator)
        yield Document(name, first)
        for i, text in enumerate(others, start=1):
            rest = text if ends_line else re.sub(r"\A\r?\n", "", text)
            yield Document(f"{name}:{i}", rest)


def _cut_if_single(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; a single one is cut into parts, so that there is something to split."""
    remaining = iter(documents)
    first_two = list(islice(remaining, 2))
    if len(first_two) != 1:
        yield from chain(first_two, remaining)
        return
    [(name, text)] = first_two
    for i, part in enumerate(_parts(text)):
        yield Document(f"{name}:{i}" if i else name, part)


def _parts(text: str) -> Iterator[str]:
    """Pieces of at most `_PART_CHARACTERS` that end at the end of a line or else of a word, if
    possible."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        limit = start + _PART_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]
