"""A content-addressed cache of tokenized corpora: built once, opened as memory maps.

The folder of one entry is `<cache root>/tokens-<key>`, the key being a hash of the corpus's
contents, the tokenizer, the split and the format, so that an entry never goes stale:

    tokenizer.json   the tokenizer, trained on the training documents or copied
    train.tokens     token ids of the training documents, each followed by the separator
    val.tokens       the same for validation; both raw little-endian uint16, or uint32
    train.crc32      the checksum of each block of train.tokens, raw little-endian uint32
    val.crc32        the same for val.tokens
    counts.npy       occurrences of each id in train.tokens, int64
    meta.json        counts, sizes and fingerprints; the checksums of the small files and its own

Nothing of it is believed unread. At a start the small files are checked, of the tokens the size and
that they are older than meta.json, which is written last; if they are not, all of them are checked
(a copy is sound, too). A block of tokens is checked when it is first used.
"""

import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nerve.data.corpus import Corpus, largest_document, validation_digests
from nerve.data.token_file import Checksums, TokenFile
from nerve.data.tokenizer import (
    TokenizerSpec,
    load_tokenizer,
    separator_id,
    tokenizer_fingerprint,
    vocab_size,
)
from nerve.errors import DataError
from nerve.files import absolute, flock, flock_within

log = logging.getLogger(__name__)

FORMAT_VERSION = 2

_SMALL_FILES = ("tokenizer.json", "counts.npy", "train.crc32", "val.crc32")

_CHARACTERS_AT_ONCE = 4_000_000  # encoded in one call: enough for all cores, little memory


@dataclass(frozen=True)
class CacheMeta:
    """What meta.json holds. `largest_val_share` is how much of the validation split's bytes one
    document has, with its copies."""

    corpus: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    n_documents: int
    n_bytes: int
    vocab_size: int
    dtype: str
    n_train_tokens: int
    n_val_tokens: int
    largest_val_document: str
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


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of all caches: the argument, else NERVE_CACHE, else `nerve` in the user cache."""
    if named := cache_dir or os.environ.get("NERVE_CACHE"):
        return absolute(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nerve"


class _Damaged(Exception):
    """An entry is not what was once written; the message says what of it."""


def cached_tokens(
    corpus: Corpus,
    spec: TokenizerSpec,
    val_fraction: float,
    cache_dir: str | Path | None = None,
) -> TokenCache:
    """Opens the entry of a corpus, a tokenizer and a split, and builds it where there is none.

    One process builds it, those that come meanwhile wait. It is built in a folder beside its final
    place and moved there in one step: an interrupted build leaves no entry, and where there are no
    locks, the first of several processes to finish gives its entry to all. An entry that is damaged
    is built again, with a warning.

    Raises:
        DataError: if the corpus cannot be read, tokenized or split, or the folder not written.
    """
    root = cache_root(cache_dir)
    path = root / f"tokens-{_key(corpus, spec, val_fraction)}"
    if (entry := _sound(path)) is not None:
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            try:
                if (entry := _open(path)) is not None:
                    return entry
            except _Damaged as damage:
                log.warning("the token cache %s is damaged (%s): building it again", path, damage)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
            try:
                _build(building, corpus, spec, val_fraction)
                _publish(building, path)
            finally:
                shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The token cache must be writable; {root} gave: {error}. Set data.cache_dir or the "
            "environment variable NERVE_CACHE to a folder with room that you may write to."
        ) from error
    entry = _sound(path)
    if entry is None:
        raise DataError(
            f"The token cache {path} cannot be read back after it was written. Check the disk, or "
            "set NERVE_CACHE to another."
        )
    return entry


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process builds the entry at `path`, and keeps others waiting."""
    try:
        lock = open(path.with_name(f".{path.name}.lock"), "a", encoding="utf-8")  # noqa: SIM115 - held open
    except PermissionError:  # that of another user, in a folder that all may write to
        yield
        return
    with lock:
        if not flock(lock.fileno()):
            log.info("another process builds the token cache %s: waiting for it", path)
            flock_within(lock.fileno(), math.inf)
        yield


def _key(corpus: Corpus, spec: TokenizerSpec, val_fraction: float) -> str:
    decisive = json.dumps([FORMAT_VERSION, corpus.key, spec.key, val_fraction])
    return hashlib.sha256(decisive.encode()).hexdigest()[:32]


def _sound(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none or it is damaged."""
    try:
        return _open(path)
    except _Damaged:
        return None


def _open(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none.

    Raises:
        _Damaged: if it is not what was once written.
    """
    if not path.is_dir():
        return None
    meta, checksums = _read_meta(path / "meta.json")
    small = {name: _read(path / name) for name in _SMALL_FILES}
    for name, data in small.items():
        if zlib.crc32(data) != checksums.get(name):
            raise _Damaged(f"{name} is not what was written")
    try:
        return TokenCache(
            path,
            meta,
            load_tokenizer(path / "tokenizer.json"),
            _tokens(path / "train.tokens", meta.dtype, meta.n_train_tokens, small["train.crc32"]),
            _tokens(path / "val.tokens", meta.dtype, meta.n_val_tokens, small["val.crc32"]),
            np.load(io.BytesIO(small["counts.npy"]), allow_pickle=False),
        )
    except (OSError, DataError) as error:
        raise _Damaged(str(error)) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _Damaged(f"{path.name}: {error.strerror}") from error


def _read_meta(path: Path) -> tuple[CacheMeta, dict[str, int]]:
    """The content of meta.json, and the checksums of the files in `_SMALL_FILES`."""
    try:
        content = json.loads(_read(path))
        own = content.pop("checksum")
        if own != _checksum_of(content):
            raise ValueError("its checksum differs")
        return CacheMeta(**content.pop("meta")), content["files"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _Damaged(f"meta.json is not what was written: {error}") from error


def _checksum_of(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _tokens(path: Path, dtype: str, n_tokens: int, checksums: bytes) -> TokenFile:
    """The tokens of an entry, all of them checked if the file is newer than the entry.

    Raises:
        OSError, DataError: if they are not what was written.
    """
    state, meta = path.stat(), path.with_name("meta.json")
    if state.st_size != n_tokens * np.dtype(dtype).itemsize:
        raise DataError(f"{path.name} does not hold {n_tokens} tokens of {dtype}")
    tokens = TokenFile(path, dtype, np.frombuffer(checksums, dtype="<u4"))
    if state.st_mtime_ns > meta.stat().st_mtime_ns:
        tokens.all()
        with suppress(OSError):  # of another user: it is then checked at each start
            os.utime(path, ns=(state.st_atime_ns, meta.stat().st_mtime_ns))
    return tokens


def _build(folder: Path, corpus: Corpus, spec: TokenizerSpec, val_fraction: float) -> None:
    validation = validation_digests(corpus.hashes, val_fraction)
    digests = [digest for digest, _ in corpus.hashes]

    def texts(in_validation: bool) -> Iterator[str]:
        for digest, document in zip(digests, corpus.documents(), strict=True):
            if (digest in validation) == in_validation:
                yield document.text

    largest = largest_document(corpus, validation)
    tokenizer = spec.build(texts(in_validation=False))
    n_ids = vocab_size(tokenizer)
    dtype = "<u2" if n_ids <= 1 << 16 else "<u4"
    train_counts = _write_tokens(folder / "train", tokenizer, texts(False), dtype)
    val_counts = _write_tokens(folder / "val", tokenizer, texts(True), dtype)
    tokenizer.save(str(folder / "tokenizer.json"))
    np.save(folder / "counts.npy", train_counts, allow_pickle=False)
    meta = CacheMeta(
        corpus=corpus.name,
        corpus_fingerprint=corpus.fingerprint,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        n_documents=len(corpus.hashes),
        n_bytes=sum(n_bytes for _, n_bytes in corpus.hashes),
        vocab_size=n_ids,
        dtype=dtype,
        n_train_tokens=int(train_counts.sum()),
        n_val_tokens=int(val_counts.sum()),
        largest_val_document=largest.name,
        largest_val_share=largest.share,
    )
    files = {name: zlib.crc32((folder / name).read_bytes()) for name in _SMALL_FILES}
    content = {"meta": asdict(meta), "files": files}
    sealed = content | {"checksum": _checksum_of(content)}
    (folder / "meta.json").write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def _write_tokens(
    split: Path, tokenizer: Tokenizer, texts: Iterable[str], dtype: str
) -> np.ndarray:
    """Writes the ids of `texts`, each followed by the separator, to `<split>.tokens`, and their
    checksums to `<split>.crc32`; counts each id."""
    separator = separator_id(tokenizer)
    counts = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    checksums = Checksums()
    with split.with_suffix(".tokens").open("wb") as file:
        for group in _groups(texts):
            for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
                ids = np.array([*encoding.ids, separator], dtype=dtype)
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


def _publish(building: Path, path: Path) -> None:
    """Moves a finished entry to its place, unless another process has put a sound one there."""
    while True:
        try:
            building.rename(path)
            return
        except OSError:
            if not path.exists():
                raise
        if _sound(path) is not None:
            return
        # A damaged entry. A folder that is not empty cannot be replaced in one step: move it away.
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=path.parent))
        path.rename(aside / path.name)
        shutil.rmtree(aside)
