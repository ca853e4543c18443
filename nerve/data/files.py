"""Text files of the user as a corpus."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from glob import glob
from itertools import chain, islice
from pathlib import Path
from types import NoneType

from nerve.config import pasted, require, require_type
from nerve.data.corpus import Corpus, Document
from nerve.data.file_formats import CODECS, READERS, is_known, read_rows
from nerve.data.tokenizer import SEPARATORS
from nerve.errors import DataError
from nerve.files import absolute

log = logging.getLogger(__name__)

_PART_CHARACTERS = 1 << 14  # some 5,000 tokens: the separators between parts do not matter


def text_files(
    paths: str | Path | Sequence[str | Path],
    *,
    text_column: str = "text",
    separator: str | None = None,
) -> Corpus:
    """The documents of files, in the order of the files' paths.

    A file of `.txt`, `.md`, `.py` or without an ending is one document, which must be UTF-8; in
    `.jsonl`, `.json` (lines, or an array) and `.parquet` each row is one, and rows without a text
    are left out. All but Parquet may be compressed (`.jsonl.gz`, `.txt.zst`). What a document holds
    between two of `separator` is a document of its own. A file that comes to a single document of
    more than 16,384 characters is cut at line ends into several, so that one long text can be
    split into training and validation.

    Args:
        paths: files, or patterns in which `*` stands for a part of a name and `**` for folders.
        text_column: the key or column that holds the text of a row; `meta.text` is `text` within
            `meta`.
        separator: what stands between documents, such as `<|endoftext|>`; None for nothing.

    Raises:
        ConfigError: for a separator that is no text.
        DataError: for a path or a pattern that matches no file, and for another kind of file. Read
            errors, which name the file and the line or column, come when the corpus is used.
    """
    require_type("data.corpus.separator", separator, str, NoneType)
    require(separator != "", "data.corpus.separator must be null or a text; got an empty one.")
    given = [paths] if isinstance(paths, str | Path) else [*paths]
    files = sorted({Path(file) for path in given for file in _matches(absolute(path))})
    for file in files:
        if not is_known(file):
            raise DataError(
                f"A text file must be one of {', '.join(filter(None, READERS))}, or without an "
                f"ending (all but .parquet also with {' or '.join(CODECS)} behind it); got {file}. "
                "Convert it, or narrow the pattern, as in 'folder/**/*.txt'."
            )
    reader = _Reader(files, text_column, separator)
    return Corpus(
        "text_files:" + ",".join(map(str, given)),
        reader.documents,
        files=files,
        reading=f"text_files {[text_column, separator]}",
        said=reader.said,
    )


class _Reader:
    """The documents of files, as often as asked; what is to be said of them is said once."""

    def __init__(self, files: Sequence[Path], text_column: str, separator: str | None) -> None:
        self._files = files
        self._base = os.path.commonpath([file.parent for file in files])
        self._text_column = text_column
        self._separator = separator
        self.said: dict[str, int] = {}

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
            self._say(f"rows without a text, left out of {file}: {n_missing}", logging.INFO)

    def _looking_for_markers(self, documents: Iterator[Document], file: Path) -> Iterator[Document]:
        for document in documents:
            for marker in _markers_in(document.text):
                self._say(
                    f"{file} has {marker!r} at ends of lines, which are read as text; if they "
                    f"stand between documents, set {pasted('data.corpus.separator', marker)}"
                )
            yield document

    def _say(self, message: str, level: int = logging.WARNING) -> None:
        if message not in self.said:
            self.said[message] = level
            log.log(level, "%s", message)


def _matches(path: Path) -> list[str]:
    found = [str(path)] if path.is_file() else glob(str(path), recursive=True)
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        raise DataError(
            f"data.corpus.paths must match at least one file each; {str(path)!r} matches none. "
            "Check the path; for all files of a folder write 'folder/**/*.txt'."
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
    """What stands between the separators. The rest of a separator's line is not text."""
    ends_line = separator.endswith("\n")
    for name, whole in documents:
        first, *others = whole.split(separator)
        yield Document(name, first)
        for i, text in enumerate(others, start=1):
            rest = text if ends_line else re.sub(r"\A\r?\n", "", text)
            yield Document(f"{name}:{i}", rest)


def _cut_if_single(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents; a single one in parts, without which there would be nothing to split."""
    remaining = iter(documents)
    first_two = list(islice(remaining, 2))
    if len(first_two) != 1:
        yield from chain(first_two, remaining)
        return
    [(name, text)] = first_two
    for i, part in enumerate(_parts(text)):
        yield Document(f"{name}:{i}" if i else name, part)


def _parts(text: str) -> Iterator[str]:
    """Pieces of at most `_PART_CHARACTERS` that end where a line, else a word, ends if one does."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        limit = start + _PART_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]
