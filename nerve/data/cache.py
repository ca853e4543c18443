"""A content-addressed cache of tokenized corpora: built once, opened as memory maps.

The folder of one entry is `<cache root>/tokens-<key>`, the key being a hash of the corpus's
contents, the tokenizer, the split and the format, so that an entry never goes stale. What is in it
says `nerve.data.cache_entry`.
"""

import hashlib
import json
import logging
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nerve.data.cache_entry import Damaged, TokenCache, build_entry, open_entry
from nerve.data.corpus import Corpus
from nerve.data.seen import key_of
from nerve.data.tokenizer import TokenizerSpec
from nerve.errors import DataError
from nerve.files import absolute, building_folder, flock, flock_within

log = logging.getLogger(__name__)

FORMAT_VERSION = 2

_DAMAGED = ".damaged-"


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder of all caches: the argument, else NERVE_CACHE, else `nerve` in the user cache."""
    if named := cache_dir or os.environ.get("NERVE_CACHE"):
        return absolute(named)
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
    is built again, with a warning.

    Raises:
        DataError: if the corpus cannot be read, tokenized or split, or the folder not written.
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
                    "the token cache %s is damaged (%s): building it again", path, str(damage)
                )
            for left in root.glob(f"{_DAMAGED}*"):  # by who could not remove it, or was killed
                shutil.rmtree(left, ignore_errors=True)
            with building_folder(root, ".building-") as building:
                build_entry(building, corpus, spec, val_fraction)
                _publish(building, path)
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
    """Waits until no other process makes what is to be at `path`, and keeps others waiting."""
    with ExitStack() as stack:
        lock = None
        for mode in ("a", "r"):  # to read it is enough where it is another user's
            with suppress(OSError):  # where nobody may write, there is nobody to wait for
                name = path.with_name(f".{path.name}.lock")
                lock = lock or stack.enter_context(open(name, mode, encoding="utf-8"))
        if lock is not None and flock(lock.fileno()) is False:
            log.info("another process makes %s: waiting for it", path)
            flock_within(lock.fileno(), math.inf)
        yield


def _key(corpus: Corpus, root: Path, spec: TokenizerSpec, val_fraction: float) -> str:
    key = key_of(corpus, root, _alone)
    decisive = json.dumps([FORMAT_VERSION, key, spec.key, val_fraction])
    return hashlib.sha256(decisive.encode()).hexdigest()[:32]


def _sound(path: Path) -> TokenCache | None:
    """The entry at `path`, or None if there is none or it is damaged."""
    try:
        return open_entry(path)
    except Damaged:
        return None


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
        aside = path.with_name(f"{_DAMAGED}{secrets.token_hex(4)}")
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
