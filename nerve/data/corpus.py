"""A corpus is a named, ordered and re-readable collection of documents; also Python source code."""

import hashlib
import logging
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nerve.data.progress import progress
from nerve.errors import DataError
from nerve.files import absolute

log = logging.getLogger(__name__)

ROOTS: dict[str, Callable[[], str]] = {
    "stdlib": lambda: sysconfig.get_path("stdlib"),
    "site-packages": lambda: sysconfig.get_path("purelib"),
}
"""Special names for the roots of `python_source`."""

_EXCLUDED_FOLDERS = (
    *("site-packages", "dist-packages", "__pycache__", ".*"),
    *("test", "tests", "idle_test", "lib2to3"),
    "config-*",  # files of the interpreter's build, which differ between machines
)
_EXCLUDED_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Document(NamedTuple):
    """A text and its name, which appears in messages and enters the fingerprint."""

    name: str
    text: str


class DocumentHash(NamedTuple):
    """What the split needs to know about a document: the SHA-256 of its text and its UTF-8 size."""

    digest: bytes
    n_bytes: int


@dataclass(frozen=True)
class Corpus:
    """A named, ordered, deterministic collection of documents.

    Args:
        name: for messages and the run's record.
        read: returns the documents; called for each pass, and must return the same ones each time.
        request: if set, identifies the contents in the token cache's key without reading them (for
            a hub dataset, which should not be downloaded again at each start).
        files: the files that `read` reads, if it reads local files.
        reading: how they are read: everything else that determines the documents.
        messages: what was logged while reading them, with the log levels.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    request: str | None = None
    files: Sequence[Path] = ()
    reading: str = ""
    messages: dict[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        """The documents in order, without those that contain only whitespace."""
        return (document for document in self.read() if document.text.strip())

    @cached_property
    def hashes(self) -> tuple[DocumentHash, ...]:
        """One hash per document, in order.

        Raises:
            DataError: if there is no document, or if the text of one cannot be encoded in UTF-8.
        """
        return tuple(hashed for _, hashed in self.named_hashes)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the names and contents of all documents, 16 hexadecimal digits."""
        total = hashlib.sha256()
        for name, hashed in self.named_hashes:
            # The name of a file may contain bytes that are not valid UTF-8.
            total.update(name.encode("utf-8", "surrogateescape") + b"\0" + hashed.digest)
        return total.hexdigest()[:16]

    @property
    def key(self) -> str:
        """Identifies the contents in the key of the token cache."""
        return self.fingerprint if self.request is None else self.request

    @cached_property
    def named_hashes(self) -> list[tuple[str, DocumentHash]]:
        """`hashes`, each with its document's name."""
        with progress(f"reading the corpus {self.name}") as add:
            return self._hash(add)

    def _hash(self, add: Callable[[int], None]) -> list[tuple[str, DocumentHash]]:
        found = []
        for name, text in self.documents():
            try:
                encoded = text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"A document must be valid Unicode; {name!r} of the corpus {self.name!r} "
                    f"contains half of a surrogate pair at character {error.start}. Remove or "
                    "repair it."
                ) from error
            found.append((name, DocumentHash(hashlib.sha256(encoded).digest(), len(encoded))))
            add(len(encoded))
        if not found:
            raise DataError(
                f"A corpus must contain at least one document with text; {self.name!r} has none. "
                "Choose files or folders that contain text."
            )
        return found


def log_once(messages: dict[str, int], message: str, level: int = logging.WARNING) -> None:
    """Logs a message about the files of a corpus unless it is among `messages`, and adds it."""
    if message not in messages:
        messages[message] = level
        log.log(level, "%s", message)


def validation_digests(hashes: Sequence[DocumentHash], val_fraction: float) -> frozenset[bytes]:
    """The digests of the documents that make up the validation split.

    Documents are taken in the order of their digests until they contain `val_fraction` of the
    bytes. This order is effectively random but depends only on their contents. The split is thus
    the same for every seed and machine, copies of a document are never on both sides, and the share
    is reached even if documents differ in size by orders of magnitude.

    Raises:
        DataError: if that leaves no document for training.
    """
    sizes: dict[bytes, int] = {}
    for digest, n_bytes in hashes:
        sizes[digest] = sizes.get(digest, 0) + n_bytes
    wanted = val_fraction * sum(sizes.values())
    chosen: set[bytes] = set()
    taken = 0
    for digest in sorted(sizes):
        if taken >= wanted:
            break
        chosen.add(digest)
        taken += sizes[digest]
    if len(chosen) == len(sizes):
        raise DataError(
            f"A corpus must have documents for both splits; got {len(sizes)}, not counting copies, "
            f"of which data.val_fraction={val_fraction} leaves none for training. Add text, "
            "separate its documents (data.corpus.separator), or lower data.val_fraction."
        )
    return frozenset(chosen)


def sample_digests(hashes: Sequence[DocumentHash], n_bytes: int) -> frozenset[bytes]:
    """The digests of a sample of documents with at least `n_bytes` in total, and no more documents
    than needed.

    Documents are taken in the order of the second halves of their digests, so that the sample is
    the same on every machine and independent of the validation split.
    """
    sizes: dict[bytes, int] = {}
    for digest, size in hashes:
        sizes[digest] = sizes.get(digest, 0) + size
    chosen: set[bytes] = set()
    taken = 0
    for digest in sorted(sizes, key=lambda digest: digest[16:]):
        if taken >= n_bytes:
            break
        chosen.add(digest)
        taken += sizes[digest]
    return frozenset(chosen)


class Largest(NamedTuple):
    """The largest document of a split: its name, its bytes, and its share of the split's bytes."""

    name: str
    n_bytes: int
    share: float


def largest_document(corpus: Corpus, digests: frozenset[bytes]) -> Largest:
    """The largest of a corpus's documents with these `digests`, including its copies."""
    sizes: dict[bytes, int] = {}
    names: dict[bytes, str] = {}
    for name, (digest, n_bytes) in corpus.named_hashes:
        if digest in digests:
            sizes[digest] = sizes.get(digest, 0) + n_bytes
            names.setdefault(digest, name)
    largest = max(sizes, key=lambda digest: sizes[digest])
    return Largest(names[largest], sizes[largest], sizes[largest] / sum(sizes.values()))


def python_source(roots: str | Path | Sequence[str | Path] | None = None) -> Corpus:
    """The `*.py` files below `roots`, by default of the running interpreter's standard library.

    Tests, installed packages, hidden folders, lib2to3 and files that depend on the build of the
    interpreter are omitted, so two machines with the same Python version have the same corpus.
    Names are relative to their root. Files are decoded according to their PEP 263 encoding
    declaration; those that Python could not decode are left out, and a warning is logged.

    Args:
        roots: folders, or the names "stdlib" and "site-packages" for those of the environment.

    Raises:
        DataError: for a root that is not a folder, and if there is no file below the roots.
    """
    given = ["stdlib"] if roots is None else [roots] if isinstance(roots, str | Path) else [*roots]
    folders = [Path(ROOTS[str(root)]()) if str(root) in ROOTS else absolute(root) for root in given]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"A root of python_source must be a folder or one of {', '.join(ROOTS)}; got "
                f"{str(folder)!r}, which is not a folder. Check the path."
            )
    files = [(folder, path) for folder in folders for path in _python_files(folder)]
    if not files:
        raise DataError(
            "python_source needs at least one Python file; there is no *.py file below "
            f"{', '.join(map(str, folders))} (folders of tests and packages and hidden folders "
            "are skipped). Choose a folder that contains source files."
        )
    messages: dict[str, int] = {}
    return Corpus(
        "python_source:" + ",".join(map(str, given)),
        lambda: _read_python(files, messages),
        files=[path for _, path in files],
        reading=f"python_source of {[*map(str, folders)]}",
        messages=messages,
    )


def _python_files(root: Path) -> list[Path]:
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _matches(name, _EXCLUDED_FOLDERS)]
        found += [
            Path(folder, name)
            for name in names
            if name.endswith(".py") and not _matches(name, _EXCLUDED_FILES)
        ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _read_python(
    files: Iterable[tuple[Path, Path]], messages: dict[str, int]
) -> Iterator[Document]:
    undecodable = []
    for root, path in files:
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # a bad declaration raises SyntaxError
            undecodable.append(str(path))
            continue
        except OSError as error:
            raise DataError(
                f"Every file of a corpus must be readable; {path} is not ({error.strerror}). "
                "Grant access, or remove its folder from the roots."
            ) from error
        yield Document(path.relative_to(root).as_posix(), text)
    if undecodable:
        log_once(
            messages,
            f"{len(undecodable)} Python files cannot be decoded and are left out of the corpus; "
            f"the first is {undecodable[0]}",
        )
