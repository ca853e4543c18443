"""Text files of the user as a corpus: plain text, JSON lines and Parquet."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nerve.data.corpus import Corpus, Document
from nerve.errors import DataError

_PART_CHARACTERS = 1 << 14  # some 5,000 tokens: the separators between parts do not matter
_ROWS_AT_ONCE = 1024


def text_files(paths: str | Path | Sequence[str | Path], *, text_column: str = "text") -> Corpus:
    """The documents of files, in the order of the files' paths.

    `.txt`, `.md` and `.py` files must be UTF-8; one that is longer than 16,384 characters is cut
    at line ends into several documents, so that a single long file can be split into training and
    validation. In `.jsonl` and `.parquet` files each row is a document.

    Args:
        paths: files, or patterns in which `*` stands for a part of a name and `**` for folders.
        text_column: the key or column that holds the text of a row.

    Raises:
        DataError: for a path or a pattern that matches no file, and for another kind of file. Read
            errors, which name the file and the line or column, come when the corpus is used.
    """
    given = [paths] if isinstance(paths, str | Path) else [*paths]
    files = sorted(
        {Path(file).absolute() for path in given for file in _matches(os.path.expanduser(path))}
    )
    for file in files:
        if file.suffix not in READERS:
            raise DataError(
                f"A text file must be one of {', '.join(READERS)}; got {file}. Convert it, or "
                "narrow the pattern, as in 'folder/**/*.txt'."
            )
    base = os.path.commonpath([file.parent for file in files])

    def read() -> Iterator[Document]:
        for file in files:
            name = file.relative_to(base).as_posix()
            try:
                yield from READERS[file.suffix](file, name, text_column)
            except OSError as error:
                raise DataError(
                    f"Every file of a corpus must be readable; {file} is not ({error.strerror}). "
                    "Grant access or leave it out of the paths."
                ) from error

    return Corpus("text_files:" + ",".join(map(str, given)), read)


def _matches(path: str) -> list[str]:
    found = [path] if os.path.isfile(path) else glob(path, recursive=True)
    files = [name for name in found if os.path.isfile(name)]
    if not files:
        raise DataError(
            f"data.corpus.paths must match at least one file each; {path!r} (from {os.getcwd()}) "
            "matches none. Check the path; for all files of a folder write 'folder/**/*.txt'."
        )
    return files


def _read_plain(path: Path, name: str, text_column: str) -> Iterator[Document]:
    parts = _parts(_decode(path.read_bytes(), f"{path}"))
    first = next(parts)
    yield Document(name, first)
    for i, part in enumerate(parts, start=1):
        yield Document(f"{name}:{i}", part)


def _parts(text: str) -> Iterator[str]:
    """Pieces of at most `_PART_CHARACTERS` that end where a line, else a word, ends if one does."""
    start = 0
    while len(text) - start > _PART_CHARACTERS:
        limit = start + _PART_CHARACTERS
        cut = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start, limit) + 1 or limit
        yield text[start:cut]
        start = cut
    yield text[start:]


def _read_json_lines(path: Path, name: str, text_column: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(_decode(line, place))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"Each line of a .jsonl file must be a JSON object; {place} is not JSON "
                    f"({error}). Repair or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"Each line of a .jsonl file must be a JSON object; {place} holds a "
                    f"{type(row).__name__}. Repair or remove the line."
                )
            _require_column(text_column, [*row], place)
            if not isinstance(row[text_column], str):
                raise DataError(
                    f"The text of a row must be a string; {text_column!r} in {place} is a "
                    f"{type(row[text_column]).__name__}. Set data.corpus.text_column to the column "
                    "of texts."
                )
            yield Document(f"{name}:{number}", row[text_column])


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Document]:
    try:
        with pq.ParquetFile(path) as file:
            _require_column(text_column, file.schema_arrow.names, str(path))
            kind = file.schema_arrow.field(text_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(
                    f"The text of a row must be a string; the column {text_column!r} of {path} "
                    f"holds {kind}. Set data.corpus.text_column to the column of texts."
                )
            number = 0
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[text_column]):
                for text in pc.fill_null(batch.column(0), "").to_pylist():
                    yield Document(f"{name}:{number}", text)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A .parquet file must be whole; {path} cannot be read ({error}). Write or copy it "
            "again, or leave it out."
        ) from error


READERS: dict[str, Callable[[Path, str, str], Iterator[Document]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".py": _read_plain,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
"""By suffix, what gives a file's documents from its path, its name and `text_column`."""


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Text must be UTF-8; {place} has the byte 0x{data[error.start]:02x} at position "
            f"{error.start}. Convert the file, for instance with: iconv -f latin1 -t utf-8"
        ) from error


def _require_column(column: str, columns: Sequence[str], place: str) -> None:
    if column not in columns:
        raise DataError(
            f"data.corpus.text_column must be a column of every row; {place} has no {column!r}, "
            f"only {', '.join(map(repr, columns))}. Set it to one of them."
        )
