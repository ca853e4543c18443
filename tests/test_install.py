"""The wheel and its requirements are sufficient: in a new environment it runs from an empty
directory."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from typing import Any, cast

import pytest
from archives import unpack
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pyproject_hooks import quiet_subprocess_runner
from support import TINY_RUN

ROOT = Path(__file__).parents[1]
Build = Callable[[str, Path, Path], Path]
"""`build("wheel", source, folder)` gives the file."""

pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]


def call(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def build() -> Iterator[Build]:
    """Builds like `python -m build`, in an environment with only the build requirements of
    pyproject.toml, shared by all builds because creating it takes longer than building."""
    with pytest.MonkeyPatch.context() as patch, DefaultIsolatedEnv() as environment:
        patch.delenv("PYTHONPATH", raising=False)
        patch.delenv("VIRTUAL_ENV", raising=False)

        def builder(source: Path) -> ProjectBuilder:
            return ProjectBuilder.from_isolated_env(environment, source, quiet_subprocess_runner)

        environment.install(builder(ROOT).build_system_requires)
        for kind in ("sdist", "wheel"):
            environment.install(builder(ROOT).get_requires_for_build(kind))
        yield lambda kind, source, folder: Path(builder(source).build(kind, folder))


@pytest.fixture(scope="module")
def wheel(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_carries_configuration_and_nothing_else_beside_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {
        f"nerve/{path.relative_to(ROOT)}"
        for folder in ("conf", "sweeps")
        for path in (ROOT / folder).rglob("*.yaml")
    }
    assert shipped <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"nerve"}


def commit_in(path: Path) -> str:
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).read("nerve/_commit.txt").decode()
    with tarfile.open(path) as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("/nerve/_commit.txt")]
        file = archive.extractfile(name)
        assert file is not None
        return file.read().decode()


def test_what_is_built_carries_the_commit_and_whether_files_differ_from_it(build, tmp_path):
    """Built from a clone: wheel, source distribution, and the wheel built from the latter."""
    clone = tmp_path / "clone"
    call("git", "clone", "-q", ROOT, clone, cwd=tmp_path)
    for name in ("hatch_build.py", "pyproject.toml", "nerve/storage/provenance.py"):
        (clone / name).write_text((ROOT / name).read_text())
    user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    call("git", *user, "commit", "-q", "--all", "--allow-empty", "-m", "as here", cwd=clone)
    commit = call("git", "rev-parse", "HEAD", cwd=clone)
    source = build("sdist", clone, tmp_path)
    unpack(source, tmp_path)
    # Of the source distribution, whose files are what was packed.
    wheel = build("wheel", tmp_path / source.name.removesuffix(".tar.gz"), tmp_path / "clean")
    assert commit_in(wheel) == commit
    assert re.fullmatch(rf"{commit.strip()} sha256:[0-9a-f]{{64}}\n", commit_in(source))
    assert call("git", "status", "--porcelain", cwd=clone) == ""
    with open(clone / "nerve" / "errors.py", "a") as file:
        file.write("# changed\n")
    wheel = build("wheel", clone, tmp_path / "changed")
    assert commit_in(wheel) == commit.strip() + "+\n"


def needed(requires: list[str]) -> set[str]:
    """The packages named by requirements, and all that these need."""
    found: set[str] = set()
    todo = [(text, frozenset[str]()) for text in requires]
    seen = set(todo)
    while todo:
        text, extras = todo.pop()
        one = Requirement(text)
        if one.marker and not any(one.marker.evaluate({"extra": e}) for e in extras or {""}):
            continue
        found.add(canonicalize_name(one.name))
        more = {(each, frozenset(one.extras)) for each in distribution(one.name).requires or []}
        todo += more - seen
        seen |= more
    return found


def link_packages(names: set[str], site: Path) -> None:
    """Links these packages of this environment into a `site-packages`: whole folders, except those
    whose files several packages share."""
    files = {name: distribution(name).files or [] for name in names}
    owners = Counter(part for of_one in files.values() for part in {f.parts[0] for f in of_one})
    for name, of_one in files.items():
        root = Path(str(distribution(name).locate_file("")))
        for parts in {f.parts if owners[f.parts[0]] > 1 else f.parts[:1] for f in of_one}:
            link = site.joinpath(*parts)
            if ".." not in parts and root.joinpath(*parts).exists() and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(root.joinpath(*parts))


def link_what_the_wheel_names(environment: Path, wheel: Path) -> None:
    """Nothing else is there, so a package that is imported but not required would be missing."""
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    (site,) = environment.glob("lib/python3.*/site-packages")
    (metadata,) = [path for path in zipfile.Path(wheel).iterdir() if ".dist-info" in path.name]
    requires = PathDistribution(cast(Any, metadata)).requires or []
    link_packages(needed(requires), site)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python"]
    call(*pip, "install", "-q", "--no-deps", "--no-index", wheel, cwd=environment.parent)
    call(*pip, "check", cwd=environment.parent)


def install_from_the_index(environment: Path, wheel: Path) -> None:
    """Installs like a user."""
    call(sys.executable, "-m", "venv", environment, cwd=environment.parent)
    pip = [environment / "bin" / "python", "-m", "pip"]
    constraints = ROOT / "constraints.txt"
    call(*pip, "install", "-q", "-c", constraints, wheel, cwd=environment.parent)


@pytest.mark.parametrize(
    "install",
    [link_what_the_wheel_names, pytest.param(install_from_the_index, marks=pytest.mark.slow)],
)
def test_the_wheel_runs_in_a_new_environment_and_an_empty_directory(wheel, tmp_path, install):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    install(environment, wheel)
    python = environment / "bin" / "python"
    out = call(
        environment / "bin" / "nerve-run",
        *TINY_RUN,
        "trainer.max_steps=3",
        cwd=empty,
    )
    assert "validation loss" in out
    rows = call(
        python,
        "-c",
        "import nerve; print(nerve.__file__, len(nerve.load_metrics('outputs')))",
        cwd=empty,
    )
    assert str(environment) in rows
    assert rows.split()[-1] == str(2 * 3)  # layers × steps 0, 2, 3
    (record,) = (empty / "outputs").glob("*/run.json")
    assert json.loads(record.read_text())["git_commit"] == commit_in(wheel).strip()
