"""A content-addressed cache of tokenized corpora: built once, opened as memory maps.

The folder of one entry is `<cache root>/tokens-<key>`, the key being a hash of the corpus's
contents, the tokenizer, the split and the format, so that an entry never goes stale:

    tokenizer.json   the tokenizer, trained on the training documents or copied
    train.tokens     token ids of the training documents, each followed by the separator
    val.tokens       the same for validation; both raw little-endian uint16, or uint32
    counts.npy       occurrences of each id in train.tokens, int64
    meta.json        counts, sizes and fingerprints
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nerve.data.corpus import Corpus, validation_digests
from nerve.data.tokenizer import (
    TokenizerSpec,
    load_tokenizer,
    separator_id,
    tokenizer_fingerprint,
    vocab_size,
)
from nerve.errors import DataError
from nerve.files import flock, flock_within

log = logging.getLogger(__name__)

FORMAT_VERSION = 1

_CHARACTERS_AT_ONCE = 4_000_000  # encoded in one call: enough for all cores, little memory


@dataclass(frozen=True)
class CacheMeta:
    """What meta.json holds."""

    corpus: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    n_documents: int
    n_bytes: int
    vocab_size: int
    dtype: str
    n_train_tokens: int
    n_val_tokens: int


@dataclass(frozen=True)
class TokenCache:
    """An opened entry; `train` and `val` are read-only memory maps of token ids."""

    path: Path
    meta: CacheMeta
    tokenizer: Tokenizer
    train: np.ndarray
    val: np.ndarray
    train_counts: np.ndarray


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of all caches: the argument, else NERVE_CACHE, else `nerve` in the user cache."""
    if cache_dir is not None:
        return Path(cache_dir)
    if named := os.environ.get("NERVE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nerve"


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
    is built again.

    Raises:
        DataError: if the corpus cannot be read, tokenized or split, or the folder not written.
    """
    root = cache_root(cache_dir)
    path = root / f"tokens-{_key(corpus, spec, val_fraction)}"
    if (entry := _open(path)) is not None:
        return entry
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            if (entry := _open(path)) is not None:
                return entry
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
    entry = _open(path)
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
        if flock(lock.fileno()) is False:
            log.info("another process builds the token cache %s: waiting for it", path)
            flock_within(lock.fileno(), math.inf)
        yield


def _key(corpus: Corpus, spec: TokenizerSpec, val_fraction: float) -> str:
    decisive = json.dumps([FORMAT_VERSION, corpus.key, spec.key, val_fraction])
    return hashlib.sha256(decisive.encode()).hexdigest()[:32]


def _open(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none or it is not what was once written."""
    try:
        meta = CacheMeta(**json.loads((path / "meta.json").read_text(encoding="utf-8")))
        tokenizer = load_tokenizer(path / "tokenizer.json")
        counts = np.load(path / "counts.npy", allow_pickle=False)
        train = _map_tokens(path / "train.tokens", meta.dtype, meta.n_train_tokens)
        val = _map_tokens(path / "val.tokens", meta.dtype, meta.n_val_tokens)
    except (OSError, ValueError, TypeError, DataError):
        return None
    sound = (
        tokenizer_fingerprint(tokenizer) == meta.tokenizer_fingerprint
        and vocab_size(tokenizer) == len(counts) == meta.vocab_size
        and counts.sum() == meta.n_train_tokens
    )
    return TokenCache(path, meta, tokenizer, train, val, counts) if sound else None


def _map_tokens(path: Path, dtype: str, n_tokens: int) -> np.ndarray:
    if path.stat().st_size != n_tokens * np.dtype(dtype).itemsize:
        raise ValueError(f"{path} does not hold {n_tokens} tokens of {dtype}")
    return np.memmap(path, dtype=dtype, mode="r", shape=(n_tokens,))


def _build(folder: Path, corpus: Corpus, spec: TokenizerSpec, val_fraction: float) -> None:
    validation = validation_digests(corpus.hashes, val_fraction)
    digests = [digest for digest, _ in corpus.hashes]

    def texts(in_validation: bool) -> Iterator[str]:
        for digest, document in zip(digests, corpus.documents(), strict=True):
            if (digest in validation) == in_validation:
                yield document.text

    tokenizer = spec.build(texts(in_validation=False))
    n_ids = vocab_size(tokenizer)
    dtype = "<u2" if n_ids <= 1 << 16 else "<u4"
    train_counts = _write_tokens(folder / "train.tokens", tokenizer, texts(False), dtype)
    val_counts = _write_tokens(folder / "val.tokens", tokenizer, texts(True), dtype)
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
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")


def _write_tokens(path: Path, tokenizer: Tokenizer, texts: Iterable[str], dtype: str) -> np.ndarray:
    """Writes the ids of `texts`, each followed by the separator, and counts each id."""
    separator = separator_id(tokenizer)
    counts = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    with path.open("wb") as file:
        for group in _groups(texts):
            for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
                ids = np.array([*encoding.ids, separator], dtype=dtype)
                counts += np.bincount(ids, minlength=len(counts))
                file.write(ids.tobytes())
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
        if _open(path) is not None:
            return
        # A damaged entry. A folder that is not empty cannot be replaced in one step: move it away.
        aside = Path(tempfile.mkdtemp(prefix=".damaged-", dir=path.parent))
        path.rename(aside / path.name)
        shutil.rmtree(aside)
