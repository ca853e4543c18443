"""A corpus: a named, ordered and re-readable collection of documents, and Python source as one."""

import hashlib
import logging
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from nerve.data.progress import progress
from nerve.errors import DataError
from nerve.files import absolute

ROOTS: dict[str, Callable[[], str]] = {
    "stdlib": lambda: sysconfig.get_path("stdlib"),
    "site-packages": lambda: sysconfig.get_path("purelib"),
}
"""Special words for the roots of `python_source`."""

_EXCLUDED_FOLDERS = (
    *("site-packages", "dist-packages", "__pycache__", ".*"),
    *("test", "tests", "idle_test", "lib2to3"),
    "config-*",  # the build of this interpreter: other on each machine
)
_EXCLUDED_FILES = ("_sysconfigdata*", "sitecustomize.py", "usercustomize.py")


class Document(NamedTuple):
    """One text with the name by which messages and the fingerprint know it."""

    name: str
    text: str


class DocumentHash(NamedTuple):
    """What the split needs to know of a document: the SHA-256 of its text and its UTF-8 size."""

    digest: bytes
    n_bytes: int


@dataclass(frozen=True)
class Corpus:
    """A named, ordered, deterministic collection of documents.

    Args:
        name: for messages and the run's record.
        read: gives the documents; called once for each pass, each time with the same result.
        request: where set, it names the contents for the token cache's key without reading them
            (a dataset of a hub, which should not be fetched again at each start).
        files: all that `read` reads, where that is files of this machine.
        reading: how these are read: what else decides the documents.
        said: what was said of them as they were read, with the level of the log.
    """

    name: str
    read: Callable[[], Iterable[Document]]
    request: str | None = None
    files: Sequence[Path] = ()
    reading: str = ""
    said: dict[str, int] = field(default_factory=dict)

    def documents(self) -> Iterator[Document]:
        """The documents in order, without those that hold nothing but white space."""
        return (document for document in self.read() if document.text.strip())

    @cached_property
    def hashes(self) -> tuple[DocumentHash, ...]:
        """One hash a document, in order.

        Raises:
            DataError: if there is no document, or if one holds text that UTF-8 cannot express.
        """
        return tuple(hashed for _, hashed in self.named_hashes)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the names and the contents of all documents."""
        total = hashlib.sha256()
        for name, hashed in self.named_hashes:
            total.update(name.encode() + b"\0" + hashed.digest)
        return total.hexdigest()[:16]

    @property
    def key(self) -> str:
        """What names the contents in the key of the token cache."""
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
                    f"A document must be valid Unicode; {name!r} of the corpus {self.name!r} holds "
                    f"half of a surrogate pair at character {error.start}. Remove or repair it."
                ) from error
            found.append((name, DocumentHash(hashlib.sha256(encoded).digest(), len(encoded))))
            add(len(encoded))
        if not found:
            raise DataError(
                f"A corpus must hold at least one document with text; {self.name!r} has none. "
                "Name files or folders that hold text."
            )
        return found


def validation_digests(hashes: Sequence[DocumentHash], val_fraction: float) -> frozenset[bytes]:
    """The digests of the documents that make up the validation split.

    Documents are taken in the order of their digests, which is as good as random but depends on
    nothing other than their contents, until they hold `val_fraction` of the bytes. So the split
    is the same for every seed and machine, copies of a document never straddle it, and the share
    is reached even where documents differ in size by orders of magnitude.

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
            f"A corpus must have documents for both splits; {len(sizes)} different documents at "
            f"val_fraction = {val_fraction} leave none for training. Add documents or lower it."
        )
    return frozenset(chosen)


def sample_digests(hashes: Sequence[DocumentHash], n_bytes: int) -> frozenset[bytes]:
    """The digests of a sample of documents that hold `n_bytes` or, by the last, a little more.

    Documents are taken in the order of their digests' second halves, so that the sample is the
    same for every machine and has nothing to do with the validation split's order.
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
    """The largest document of a split: its name, its bytes, and their share of the split's."""

    name: str
    n_bytes: int
    share: float


def largest_document(corpus: Corpus, digests: frozenset[bytes]) -> Largest:
    """The largest of a corpus's documents with these `digests`, its copies counted with it."""
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

    Tests, installed packages, hidden folders, lib2to3 and files that differ with the build of the
    interpreter are left out, so two machines with the same Python version have the same corpus.
    Names are relative to their root. Files are decoded by their PEP 263 cookie; those that Python
    could not decode either are left out with a warning.

    Args:
        roots: folders, or the words "stdlib" and "site-packages" for the environment's own.

    Raises:
        DataError: for a root that is no folder, and if there is no file below the roots.
    """
    given = ["stdlib"] if roots is None else [roots] if isinstance(roots, str | Path) else [*roots]
    folders = [Path(ROOTS[str(root)]()) if str(root) in ROOTS else absolute(root) for root in given]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(
                f"A root of python_source must be a folder or one of {', '.join(ROOTS)}; got "
                f"{str(folder)!r}, which is none. Check the path."
            )
    files = [(folder, path) for folder in folders for path in _python_files(folder)]
    if not files:
        raise DataError(
            f"python_source found no *.py file below {', '.join(map(str, folders))} (folders of "
            "tests, packages and hidden ones are left out). Name a folder that holds source files."
        )
    said: dict[str, int] = {}
    return Corpus(
        "python_source:" + ",".join(map(str, given)),
        lambda: _read_python(files, said),
        files=[path for _, path in files],
        reading=f"python_source of {[*map(str, folders)]}",
        said=said,
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


def _read_python(files: Iterable[tuple[Path, Path]], said: dict[str, int]) -> Iterator[Document]:
    undecodable = []
    for root, path in files:
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # a bad cookie is a SyntaxError
            undecodable.append(str(path))
            continue
        except OSError as error:
            raise DataError(
                f"Every file of a corpus must be readable; {path} is not ({error.strerror}). "
                "Grant access or leave its folder out of the roots."
            ) from error
        yield Document(path.relative_to(root).as_posix(), text)
    if undecodable:
        message = (
            f"{len(undecodable)} Python files that cannot be decoded are left out of the corpus, "
            f"the first being {undecodable[0]}"
        )
        said[message] = logging.WARNING
        warnings.warn(message, stacklevel=2)
