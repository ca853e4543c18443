"""Which contents a corpus of files had when it was last read: what saves a start reading it.

Beside the token caches lies one small file for each state of a corpus's files that was read. It is
found by the names, sizes and times of these files, and by how they are read, so it never goes
stale: whatever writes to a file, puts another in its place or sets its time back changes the time
of its last change (`ctime`), which no program can choose.

    corpus-<state>.json   the fingerprint of the contents, what was to be said of them, a checksum
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nerve.data.cache_entry import checksum_of
from nerve.data.corpus import Corpus
from nerve.errors import DataError, StoreError
from nerve.files import write_atomically

log = logging.getLogger(__name__)

SETTLED_AFTER_NS = 2_000_000_000
"""Of a file that changed less than this before it was read, a later change may have the same time:
file systems count in steps of up to two seconds."""

_READERS = ("corpus.py", "files.py", "file_formats.py")
"""What makes documents of files. Another version of it may make others."""


@dataclass(frozen=True)
class _State:
    """What the directory says of a corpus's files.

    Attributes:
        name: hexadecimal digits over all of it.
        newest_ns: when the last of them changed.
    """

    name: str
    newest_ns: int


def key_of(
    corpus: Corpus, root: Path, alone: Callable[[Path], AbstractContextManager[None]]
) -> str:
    """`corpus.key`, without reading files that were read as they are.

    Args:
        corpus: the corpus.
        root: the folder of the caches.
        alone: keeps other processes from reading the same corpus, which wait and need not.
    """
    if corpus.request is not None or not corpus.files:
        return corpus.key
    path = root / f"corpus-{_state(corpus).name}.json"
    found = _read(path)
    if found is None:
        with alone(path):
            found = _read(path) or _look(corpus, root)
    for message, level in found["said"]:
        log.log(level, "%s", message)
    return str(found["fingerprint"])


def _look(corpus: Corpus, root: Path) -> dict[str, Any]:
    """Reads the corpus, and writes down what it holds if its files have been at rest."""
    before, began_ns = _state(corpus), time.time_ns()
    content = {"fingerprint": corpus.fingerprint, "said": sorted(corpus.said.items())}
    is_settled = before.newest_ns < began_ns - SETTLED_AFTER_NS
    if is_settled and _state(corpus) == before:
        sealed = json.dumps(content | {"checksum": checksum_of(content)})
        try:
            path = root / f"corpus-{before.name}.json"
            write_atomically(path, lambda file: file.write(sealed.encode()), durable=False)
        except StoreError as error:
            log.info("the corpus %s is read again at each start: %s", corpus.name, str(error))
    return content | {"said": []}  # it was said as it was read


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
                "Grant access or leave it out of the paths."
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
