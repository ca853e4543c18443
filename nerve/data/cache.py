"""A content-addressed cache of tokenized corpora: built once, opened as memory maps.

The folder of an entry is `<cache root>/tokens-<key>`, where the key is a hash of the corpus's
contents, the tokenizer, the split and the format, so that an entry never becomes outdated.
`nerve.data.cache_entry` describes its files.

In addition there is a small file for each state of a corpus's files that was read, so that later
starts need not read them again. Its name is derived from the names, sizes and times of these files
and from how they are read. It never becomes outdated: writing to a file, replacing it or resetting
its time changes the time of its last change (`ctime`), which no program can set.

    corpus-<state>.json   the fingerprint of the contents, the log messages about them, a checksum
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nerve.data.cache_entry import (
    Damaged,
    TokenCache,
    build_entry,
    checksum_of,
    open_entry,
    tokenizer_of,
)
from nerve.data.corpus import Corpus
from nerve.data.tokenizer import TokenizerSpec
from nerve.errors import DataError, StoreError
from nerve.files import absolute, building_folder, flock, flock_within, write_atomically

log = logging.getLogger(__name__)

FORMAT_VERSION = 2

_DAMAGED = ".damaged-"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of all caches: the argument, or NERVE_CACHE, or `nerve` in the user's cache."""
    if named := cache_dir or os.environ.get("NERVE_CACHE"):
        return absolute(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nerve"


def cached_tokens(
    corpus: Corpus,
    spec: TokenizerSpec,
    val_fraction: float,
    cache_dir: str | Path | None = None,
) -> TokenCache:
    """Opens the entry of a corpus, a tokenizer and a split, and builds it if there is none.

    One process builds it while others wait. It is built in a temporary folder and moved to its
    final place in one step: an interrupted build leaves no entry, and without file locks all
    processes use the entry of the first one to finish. A damaged entry is rebuilt, with a warning.

    Raises:
        DataError: if the corpus cannot be read, tokenized or split, or the cache cannot be written.
    """
    root = cache_root(cache_dir)
    try:
        root.mkdir(parents=True, exist_ok=True)
        path = root / f"tokens-{_key(corpus, root, spec, val_fraction)}"
        if (entry := _sound(path)) is not None:
            return entry
        with _alone(path):
            try:
                if (entry := open_entry(path)) is not None:
                    return entry
            except Damaged as damage:
                log.warning(
                    "the token cache %s is damaged (%s) and will be rebuilt", path, str(damage)
                )
            for left in root.glob(f"{_DAMAGED}*"):  # left by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            log.info("tokenizing %s, once: later runs read the tokens from %s", corpus.name, root)
            with building_folder(root, ".building-") as building:
                build_entry(building, corpus, spec, val_fraction)
                _publish(building, path)
    except OSError as error:
        raise DataError(
            f"The token cache must be writable; {root} is not: {error}. Set data.cache_dir or the "
            "environment variable NERVE_CACHE to a writable folder with enough space."
        ) from error
    entry = _sound(path)
    if entry is None:
        raise DataError(
            f"The token cache must be readable after it was written; {path} is not. Check the "
            "disk, or set NERVE_CACHE to a folder on another one."
        )
    return entry


def cached_tokenizer(root: Path, fingerprint: str) -> Tokenizer | None:
    """The tokenizer with this fingerprint of an entry in `root`; None if no entry that can be read
    has it. The corpus is not needed."""
    for path in sorted(root.glob("tokens-*")):
        with suppress(Damaged, DataError):  # another entry may have it, too
            if (tokenizer := tokenizer_of(path, fingerprint)) is not None:
                return tokenizer
    return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process is building `path`, and makes other processes wait."""
    with ExitStack() as stack:
        lock = None
        for mode in ("a", "r"):  # a lock file of another user can be locked with read permission
            with suppress(OSError):  # if nobody may write here, there is nobody to wait for
                name = path.with_name(f".{path.name}.lock")
                lock = lock or stack.enter_context(open(name, mode, encoding="utf-8"))
        if lock is not None and flock(lock.fileno()) is False:
            log.info("another process is building %s: waiting for it", path)
            flock_within(lock.fileno(), math.inf)
        yield


def _key(corpus: Corpus, root: Path, spec: TokenizerSpec, val_fraction: float) -> str:
    key = key_of(corpus, root)
    decisive = json.dumps([FORMAT_VERSION, key, spec.key, val_fraction])
    return hashlib.sha256(decisive.encode()).hexdigest()[:32]


def _sound(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none or it is damaged."""
    try:
        return open_entry(path)
    except Damaged:
        return None


def _publish(building: Path, path: Path) -> None:
    """Moves a finished entry to its place, unless another process has created a valid one there."""
    while True:
        try:
            building.rename(path)
            return
        except OSError:
            if not path.exists():
                raise
        if _sound(path) is not None:
            return
        # There is a damaged entry. A nonempty folder cannot be replaced in one step: move it away.
        aside = path.with_name(f"{_DAMAGED}{secrets.token_hex(4)}")
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


SETTLED_AFTER_NS = 2_000_000_000
"""If a file changed less than this before it was read, a later change may get the same time stamp:
file systems have a resolution of up to two seconds."""


_READERS = ("corpus.py", "files.py", "file_formats.py")
"""The code that turns files into documents; another version may produce other documents."""


@dataclass(frozen=True)
class _State:
    """The names, sizes and times of a corpus's files.

    Attributes:
        name: a hash of all of them, in hexadecimal digits.
        newest_ns: the time of the latest change of any of the files.
    """

    name: str
    newest_ns: int


def key_of(corpus: Corpus, root: Path) -> str:
    """`corpus.key`, without reading files that have not changed since they were last read.

    Args:
        corpus: the corpus.
        root: the folder of the caches.
    """
    if corpus.request is not None or not corpus.files:
        return corpus.key
    path = root / f"corpus-{_state(corpus).name}.json"
    found = _read(path)
    if found is None:
        with _alone(path):  # other processes wait, and then need not read the corpus
            found = _read(path) or _look(corpus, root)
    for message, level in found["messages"]:
        log.log(level, "%s", message)
    return str(found["fingerprint"])


def _look(corpus: Corpus, root: Path) -> dict[str, Any]:
    """Reads the corpus, and stores its fingerprint and messages unless its files just changed."""
    before, began_ns = _state(corpus), time.time_ns()
    content = {"fingerprint": corpus.fingerprint, "messages": sorted(corpus.messages.items())}
    is_settled = before.newest_ns < began_ns - SETTLED_AFTER_NS
    if is_settled and _state(corpus) == before:
        sealed = json.dumps(content | {"checksum": checksum_of(content)})
        try:
            path = root / f"corpus-{before.name}.json"
            write_atomically(path, lambda file: file.write(sealed.encode()), durable=False)
        except StoreError as error:
            reason = str(error.__cause__ or error)
            log.info("the corpus %s will be read at each start: %s", corpus.name, reason)
    return content | {"messages": []}  # the messages were logged while reading


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("checksum") == checksum_of(content):
            return dict(content)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        pass
    return None


def _state(corpus: Corpus) -> _State:
    digest = hashlib.sha256(f"{_code()}\0{corpus.reading}".encode())
    newest_ns = 0
    for path in corpus.files:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(
                f"Every file of a corpus must be readable; {path} is not ({error.strerror}). "
                "Grant access, or remove it from the paths."
            ) from error
        times = status.st_mtime_ns, status.st_ctime_ns
        digest.update(b"\0" + os.fsencode(path) + repr((status.st_size, *times)).encode())
        newest_ns = max(newest_ns, *times)
    return _State(digest.hexdigest()[:32], newest_ns)


@lru_cache
def _code() -> str:
    """A digest of the code that reads files."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _READERS)).hexdigest()
