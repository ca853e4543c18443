"""One entry of the token cache: its files, and how it is built and opened.

    tokenizer.json   the tokenizer, trained on the training documents or copied
    train.tokens     token ids of the training documents, each followed by the separator
    val.tokens       the same for validation; both raw little-endian uint16, or uint32
    train.crc32      the checksum of each block of train.tokens, raw little-endian uint32
    val.crc32        the same for val.tokens
    counts.npy       occurrences of each id in train.tokens, int64
    meta.json        counts, sizes and fingerprints; the checksums of the small files and its own

Everything is verified before it is used. At each start, the small files are verified. Of the token
files, only the size is checked, and whether they are older than meta.json, which is written last;
if they are newer, as in a copy, they are verified completely. A block of tokens is verified when it
is first used.
"""

import io
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nerve.data.corpus import Corpus, largest_document, sample_digests, validation_digests
from nerve.data.progress import counted, progress
from nerve.data.token_file import Checksums, TokenFile
from nerve.data.tokenizer import (
    TokenizerSpec,
    load_tokenizer,
    separator_of,
    tokenizer_fingerprint,
    vocab_size,
)
from nerve.errors import DataError

log = logging.getLogger(__name__)

_SMALL_FILES = ("tokenizer.json", "counts.npy", "train.crc32", "val.crc32")

_CHARACTERS_AT_ONCE = 4_000_000  # encoded in one call: enough for all cores, little memory


@dataclass(frozen=True)
class CacheMeta:
    """The contents of meta.json. `largest_val_share` is the share of the validation split's bytes
    that belong to its largest document, including copies."""

    corpus: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    separator: str
    n_documents: int
    n_bytes: int
    vocab_size: int
    dtype: str
    n_train_tokens: int
    n_val_tokens: int
    largest_val_document: str
    largest_val_bytes: int
    largest_val_share: float


@dataclass(frozen=True)
class TokenCache:
    """An opened entry."""

    path: Path
    meta: CacheMeta
    tokenizer: Tokenizer
    train: TokenFile
    val: TokenFile
    train_counts: np.ndarray


class Damaged(Exception):
    """An entry differs from what was written; the message names the part."""


def open_entry(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none.

    Raises:
        Damaged: if it differs from what was written.
        DataError: if it belongs to another user and may not be read.
    """
    if not path.is_dir():
        return None
    meta, checksums = _read_meta(path / "meta.json")
    small = {name: _read_small(path / name, checksums) for name in _SMALL_FILES}
    try:
        return TokenCache(
            path,
            meta,
            load_tokenizer(path / "tokenizer.json", meta.separator),
            _tokens(path / "train.tokens", meta.dtype, meta.n_train_tokens, small["train.crc32"]),
            _tokens(path / "val.tokens", meta.dtype, meta.n_val_tokens, small["val.crc32"]),
            np.load(io.BytesIO(small["counts.npy"]), allow_pickle=False),
        )
    except (OSError, DataError) as error:
        raise Damaged(str(error)) from error


def tokenizer_of(path: Path, fingerprint: str) -> Tokenizer | None:
    """The tokenizer of the entry at `path`; None if it has another fingerprint.

    Raises:
        Damaged: if it differs from what was written.
        DataError: if it cannot be read.
    """
    meta, checksums = _read_meta(path / "meta.json")
    if meta.tokenizer_fingerprint != fingerprint:
        return None
    _read_small(path / "tokenizer.json", checksums)
    return load_tokenizer(path / "tokenizer.json", meta.separator)


def _read_small(path: Path, checksums: Mapping[str, int]) -> bytes:
    """The contents of one of `_SMALL_FILES`. Raises `Damaged` if they changed."""
    data = _read(path)
    if zlib.crc32(data) != checksums.get(path.name):
        raise Damaged(f"{path.name} is not what was written")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise DataError(
            f"The token cache must be readable; {path.parent} belongs to another user and is not "
            f"({error.strerror}). Ask them to run chmod -R a+rX on it, or set data.cache_dir or "
            "NERVE_CACHE to a folder of your own."
        ) from error
    except OSError as error:
        raise Damaged(f"{path.name}: {error.strerror}") from error


def _read_meta(path: Path) -> tuple[CacheMeta, dict[str, int]]:
    """The contents of meta.json, and the checksums of the files in `_SMALL_FILES`."""
    try:
        content = json.loads(_read(path))
        own = content.pop("checksum")
        if own != checksum_of(content):
            raise ValueError("its checksum differs")
        return CacheMeta(**content.pop("meta")), content["files"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"meta.json is not what was written: {error}") from error


def checksum_of(content: Mapping[str, Any]) -> int:
    """The checksum of the contents of a JSON file, to be stored in it."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _tokens(path: Path, dtype: str, n_tokens: int, checksums: bytes) -> TokenFile:
    """The tokens of an entry, verified completely if the file is newer than meta.json.

    Raises:
        OSError, DataError: if they differ from what was written.
    """
    state, meta = path.stat(), path.with_name("meta.json")
    if state.st_size != n_tokens * np.dtype(dtype).itemsize:
        raise DataError(f"{path.name} does not hold {n_tokens} tokens of {dtype}")
    tokens = TokenFile(path, dtype, np.frombuffer(checksums, dtype="<u4"))
    if state.st_mtime_ns > meta.stat().st_mtime_ns:
        tokens.all()
        with suppress(OSError):  # a file of another user: it is then verified at each start
            os.utime(path, ns=(state.st_atime_ns, meta.stat().st_mtime_ns))
    return tokens


def build_entry(folder: Path, corpus: Corpus, spec: TokenizerSpec, val_fraction: float) -> None:
    """Writes an entry into an empty folder.

    Raises:
        DataError: if the corpus cannot be read, tokenized or split.
    """
    validation = validation_digests(corpus.hashes, val_fraction)
    training = frozenset(digest for digest, _ in corpus.hashes) - validation
    splits = {"train": training, "val": validation}
    sizes = {
        split: sum(n_bytes for digest, n_bytes in corpus.hashes if digest in digests)
        for split, digests in splits.items()
    }
    largest = largest_document(corpus, validation)
    tokenizer = _tokenizer(corpus, spec, training, sizes["train"])
    separator = separator_of(tokenizer, spec.separator)
    n_ids = vocab_size(tokenizer)
    dtype = "<u2" if n_ids <= 1 << 16 else "<u4"
    counts = {}
    for split, digests in splits.items():
        with progress(f"writing {split}.tokens", sizes[split]) as add:
            texts = counted(_texts(corpus, digests), add)
            counts[split] = _write_tokens(folder / split, tokenizer, separator, texts, dtype)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    np.save(folder / "counts.npy", counts["train"], allow_pickle=False)
    meta = CacheMeta(
        corpus=corpus.name,
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        separator=separator,
        n_documents=len(corpus.hashes),
        n_bytes=sum(sizes.values()),
        vocab_size=n_ids,
        dtype=dtype,
        n_train_tokens=int(counts["train"].sum()),
        n_val_tokens=int(counts["val"].sum()),
        largest_val_document=largest.name,
        largest_val_bytes=largest.n_bytes,
        largest_val_share=largest.share,
    )
    files = {name: zlib.crc32((folder / name).read_bytes()) for name in _SMALL_FILES}
    content = {"meta": asdict(meta), "files": files}
    sealed = content | {"checksum": checksum_of(content)}
    (folder / "meta.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def _tokenizer(
    corpus: Corpus, spec: TokenizerSpec, training: frozenset[bytes], n_bytes: int
) -> Tokenizer:
    """The tokenizer, trained on a sample if the training split is larger than `sample_bytes`."""
    if spec.path is not None or n_bytes <= spec.sample_bytes:
        return spec.build(_texts(corpus, training), n_bytes)
    log.info(
        "training the tokenizer on %.0f MB of the %.0f MB of the training split",
        spec.sample_bytes / 1e6,
        n_bytes / 1e6,
    )
    sample = sample_digests([h for h in corpus.hashes if h.digest in training], spec.sample_bytes)
    return spec.build(_texts(corpus, sample), spec.sample_bytes)


def _texts(corpus: Corpus, digests: frozenset[bytes]) -> Iterator[str]:
    """The texts of the documents with these digests, in order."""
    for hashed, document in zip(corpus.hashes, corpus.documents(), strict=True):
        if hashed.digest in digests:
            yield document.text


def _write_tokens(
    split: Path, tokenizer: Tokenizer, separator: str, texts: Iterable[str], dtype: str
) -> np.ndarray:
    """Writes the ids of `texts`, each followed by the separator, to `<split>.tokens`, and their
    checksums to `<split>.crc32`; counts each id."""
    end = tokenizer.token_to_id(separator)
    counts = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    checksums = Checksums()
    with split.with_suffix(".tokens").open("wb") as file:
        for group in _groups(texts):
            for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype=dtype)
                counts += np.bincount(ids, minlength=len(counts))
                file.write(ids.tobytes())
                checksums.update(ids.tobytes())
    split.with_suffix(".crc32").write_bytes(checksums.of_blocks().tobytes())
    return counts


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    group: list[str] = []
    n_characters = 0
    for text in texts:
        group.append(text)
        n_characters += len(text)
        if n_characters >= _CHARACTERS_AT_ONCE:
            yield group
            group, n_characters = [], 0
    if group:
        yield group
