"""Reads rows from files: plain text, JSON and Parquet, compressed or not."""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nerve.errors import DataError

_ROWS_AT_ONCE = 1024


class Row(NamedTuple):
    """A row's name and its text, which is None if the row has none."""

    name: str
    text: str | None


CODECS = {".gz": "gzip", ".zst": "zstd"}
"""pyarrow's name of the codec, by the last suffix of a compressed file."""


def read_rows(path: Path, name: str, text_column: str) -> Iterator[Row]:
    """The rows of a file for which `is_known` is true, in order.

    Args:
        path: path of the file.
        name: the name of the file in the names of its rows.
        text_column: the key or column with the text; `a.b` is `b` within `a`.

    Raises:
        DataError: names the file and the line or column.
    """
    ending, codec = _ending_and_codec(path)
    try:
        yield from READERS[ending](path, name, text_column)
    except (OSError, pa.ArrowException, EOFError) as error:
        if isinstance(error, FileNotFoundError | PermissionError) or codec is None:
            reason = getattr(error, "strerror", None) or error
            raise DataError(
                f"Every file of a corpus must be readable; {path} is not ({reason}). "
                "Grant access, or remove it from the paths."
            ) from error
        raise DataError(
            f"A compressed file must be complete; {path} cannot be read as {codec} ({error}). Copy "
            "it again, or remove it from the paths."
        ) from error


def is_known(path: Path) -> bool:
    """Whether `read_rows` recognizes the file's format by its name."""
    ending, codec = _ending_and_codec(path)
    return ending in READERS and not (codec and ending == ".parquet")


def _ending_and_codec(path: Path) -> tuple[str, str | None]:
    ending = path.suffix.lower()
    if ending in CODECS:
        return Path(path.stem).suffix.lower(), CODECS[ending]
    return ending, None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The contents of a file, decompressed."""
    _, codec = _ending_and_codec(path)
    if codec is None:
        with path.open("rb") as file:
            yield file
    else:
        with pa.CompressedInputStream(pa.OSFile(os.fsencode(path)), codec) as stream:
            yield io.BufferedReader(stream)


def _read_plain(path: Path, name: str, text_column: str) -> Iterator[Row]:
    with _opened(path) as file:
        yield Row(name, _decode(file.read(), str(path)))


def _read_json_lines(path: Path, name: str, text_column: str) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            if text := _decode(line, place).strip():
                row = _parsed(text, f"Each line of a {path.suffix} file", place)
                yield Row(f"{name}:{number}", _text(row, text_column, place))


def _read_json(path: Path, name: str, text_column: str) -> Iterator[Row]:
    """Reads an array of rows, a single row that spans several lines, or one row per line."""
    with _opened(path) as file:
        start = file.readline()
        while start and not _decode(start, f"{path}, line 1").strip():
            start = file.readline()
        if _is_json(start) and not start.lstrip(b"\xef\xbb\xbf \t").startswith(b"["):
            rows = None
        else:
            rule = "A .json file that does not have one object per line"
            rows = _parsed(_decode(start + file.read(), str(path)), rule, str(path), (list, dict))
    if rows is None:
        yield from _read_json_lines(path, name, text_column)
        return
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        place = f"{path}, row {number}"
        _require_object(row, "Each row of a .json file", place, (dict,))
        yield Row(f"{name}:{number}", _text(row, text_column, place))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8-sig"))
    except ValueError:
        return False
    return True


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Row]:
    number = 0
    try:
        with pa.OSFile(os.fsencode(path)) as raw, pq.ParquetFile(raw) as file:
            _require_strings(file.schema_arrow, text_column, path)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[text_column]):
                for text in _column(batch, text_column).to_pylist():
                    yield Row(f"{name}:{number}", text)
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"A .parquet file must be complete; {path} cannot be read ({error}). Write or copy it "
            "again, or remove it from the paths."
        ) from error


READERS: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".py": _read_plain,
    "": _read_plain,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""The functions that read a file's rows, given its path, its name and `text_column`, by suffix."""


# Text


_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""Byte order marks; a mark that begins with another one comes before it."""


def _decode(data: bytes, place: str) -> str:
    encoding = _other_encoding(data)
    if encoding is not None:
        raise DataError(
            f"Text must be UTF-8; {place} is {encoding}. Convert the file: "
            f"iconv -f {encoding} -t UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Text must be UTF-8; {place} has the byte 0x{data[error.start]:02x} at position "
            f"{error.start}. Convert the file, for example with: iconv -f latin1 -t utf-8"
        ) from error


def _other_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32, if a byte order mark or the positions of the zero bytes show it: in text
    that is mostly ASCII, all bytes of a character except one are zero."""
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            return encoding
    head = data[: min(len(data), 4096) // 4 * 4]
    if b"\0" not in head:
        return None
    zeros = [head[i::4].count(0) / len(head[i::4]) for i in range(4)]
    pattern = "".join("0" if share > 0.5 else "x" for share in zeros)
    return {"x000": "UTF-32LE", "000x": "UTF-32BE", "x0x0": "UTF-16LE", "0x0x": "UTF-16BE"}.get(
        pattern
    )


# Rows of JSON


def _parsed(text: str, rule: str, place: str, kinds: tuple[type, ...] = (dict,)) -> Any:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{rule} must be {_names(kinds)}; {place} is not JSON ({error}). Repair or remove it."
        ) from error
    _require_object(row, rule, place, kinds)
    return row


def _require_object(row: Any, rule: str, place: str, kinds: tuple[type, ...]) -> None:
    if not isinstance(row, kinds):
        raise DataError(
            f"{rule} must be {_names(kinds)}; {place} is of type {type(row).__name__}. Repair or "
            "remove it."
        )


def _names(kinds: tuple[type, ...]) -> str:
    return "a JSON object or an array of them" if list in kinds else "a JSON object"


def _text(row: dict[str, Any], text_column: str, place: str) -> str | None:
    value: Any = row
    for name, within in _steps(text_column, row):
        if value is None:
            return None
        columns = [*value] if isinstance(value, dict) else []
        _require_column(text_column, name, within, columns, place)
        value = value[name]
    if not isinstance(value, str | None):
        raise DataError(
            f"The text of a row must be a string; {text_column!r} in {place} is of type "
            f"{type(value).__name__}. Set data.corpus.text_column to the column with the text."
        )
    return value


def _steps(text_column: str, columns: Sequence[str] | dict[str, Any]) -> list[tuple[str, str]]:
    """The nested names of `text_column`, each with the column that contains it; a column that is
    itself named `a.b` takes precedence over `b` within `a`."""
    names = [text_column] if text_column in columns else text_column.split(".")
    return [(name, ".".join(names[:i])) for i, name in enumerate(names)]


def _require_column(
    text_column: str, name: str, within: str, columns: Sequence[str], place: str
) -> None:
    if name not in columns:
        there = ", ".join(map(repr, columns)) or "no column"
        where = f" in {within!r}" if within else ""
        raise DataError(
            f"data.corpus.text_column must be a column of every row; {place} has no "
            f"{text_column!r}, only {there}{where}. Set it to one of them; a nested column is "
            "written like meta.text."
        )


# Columns of Parquet


def _require_strings(schema: pa.Schema, text_column: str, path: Path) -> None:
    fields = {field.name: field.type for field in schema}
    kind: pa.DataType = None
    for name, within in _steps(text_column, [*fields]):
        _require_column(text_column, name, within, [*fields], str(path))
        kind = fields[name]
        fields = {field.name: field.type for field in kind} if pa.types.is_struct(kind) else {}
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(test(kind) for test in (*is_text, pa.types.is_null)):
        raise DataError(
            f"The text of a row must be a string; the column {text_column!r} of {path} is of type "
            f"{kind}. Set data.corpus.text_column to the column with the text."
        )


def _column(batch: pa.RecordBatch, text_column: str) -> pa.Array:
    (first, _), *rest = _steps(text_column, batch.schema.names)
    column = batch.column(first)
    for name, _ in rest:
        column = pc.struct_field(column, name)
    return column
