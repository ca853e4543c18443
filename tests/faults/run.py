"""The tests on a copy of the tree that has faults in it.

Each run has a copy and a token cache of its own: a cache that is shared would hide a fault from the
tests of what fills it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from place import Fault, put_in

QUICK = "not slow and not slurm and not install and not cuda"
NOT_COPIED = (".git", ".venv", ".*_cache", "__pycache__", "outputs", "build", "dist")
ALL_PASSED, SOME_FAILED, COLLECTION_FAILED, NONE_COLLECTED = 0, 1, 2, 5  # pytest's exit codes
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", re.MULTILINE)
_CONFTEST = re.compile(
    r"""ImportError while loading conftest '(.+)'|File "(.+)", line \d+, in pytest_configure$""",
    re.MULTILINE,
)


@contextmanager
def copy_with(faults: Iterable[Fault], root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A temporary copy of the tree at `root` with `faults` in it, and the files they went into.

    Raises:
        PlaceError: when a fault has no place.
    """
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder).resolve() / "tree"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
        (copy / "outputs").mkdir()
        yield copy, [put_in(fault, copy) for fault in faults]


def near_tests(module: Path, tree: Path) -> list[str]:
    """Test files that mirror `module` by their name, its own folder first, then those that name it
    in an import or a string. Where there are none, those of the modules that import it, and so on
    up to the first that have tests."""
    tests = sorted((tree / "tests").rglob("test_*.py"))
    sources = {path: path.read_text() for path in sorted((tree / "nerve").rglob("*.py"))}
    reached = level = [module]
    near: list[Path] = []
    while level and not near:
        near = list(dict.fromkeys(test for path in level for test in _near(path, tree, tests)))
        users = {u for u, text in sources.items() for path in level if _names(text, path, tree)}
        level = sorted(users - set(reached))
        reached = reached + level
    return [str(path.relative_to(tree)) for path in near]


def _near(module: Path, tree: Path, tests: list[Path]) -> list[Path]:
    stem = module.parent.name if module.stem == "__init__" else module.stem
    mirror = [path for path in tests if path.name == f"test_{stem}.py"]
    mirror.sort(key=lambda path: path.parent.name != module.parent.name)
    others = [path for path in tests if path not in mirror]
    return mirror + [path for path in others if _names(path.read_text(), module, tree)]


def _names(source: str, module: Path, tree: Path) -> bool:
    """Whether `source` imports `module` or has its dotted name in a string."""
    *folders, stem = module.relative_to(tree).with_suffix("").parts
    package = re.escape(".".join(folders))
    if stem == "__init__":
        return bool(re.search(rf"^(from {package} import|import {package}$)", source, re.MULTILINE))
    imported = rf"from {package} import (\([^)]*|.*)\b{stem}\b"
    return bool(re.search(rf"\b{package}\.{stem}\b|{imported}", source))


def failing_without_fault(tests: Sequence[str], root: Path) -> list[str]:
    """Those of `tests` that prove nothing, since they fail on the tree as it is."""
    with copy_with([], root) as (copy, _):
        return failing(copy, ["-n0", *tests]) if tests else []


def failing(tree: Path, arguments: Sequence[str]) -> list[str]:
    """Runs the quick tests of `tree` with `arguments` to pytest; the ids of those that fail.

    A conftest.py that cannot be imported stands for its tests.

    Raises:
        RuntimeError: when pytest does not end as it does with tests that pass or fail, or when
            `nerve` is imported from elsewhere.
    """
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment["COLUMNS"] = "200"

    def python(*command: str) -> subprocess.CompletedProcess[str]:
        whole = (sys.executable, *command)
        return subprocess.run(whole, cwd=tree, env=environment, capture_output=True, text=True)

    where = "import importlib.util; print(importlib.util.find_spec('nerve').origin)"
    if not Path(python("-c", where).stdout.strip()).is_relative_to(tree):
        raise RuntimeError(f"nerve is not imported from {tree}")
    options = ("-q", "-p", "no:cacheprovider", "-m", QUICK, "--tb=no", "-rfE")
    ended = python("-m", "pytest", *options, *arguments)
    if ended.returncode in (ALL_PASSED, NONE_COLLECTED):
        return []
    if conftest := _CONFTEST.search(ended.stdout + ended.stderr):
        return [str(Path(conftest[1] or conftest[2]).relative_to(tree))]
    failed = _FAILED.findall(ended.stdout)
    if ended.returncode not in (SOME_FAILED, COLLECTION_FAILED) or not failed:
        raise RuntimeError(
            f"pytest ended with {ended.returncode}: {ended.stdout[-500:]}{ended.stderr[-500:]}"
        )
    return list(dict.fromkeys(failed))
