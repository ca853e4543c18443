"""The wheel alone is enough: installed into a new environment, it runs from an empty directory."""

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.install, pytest.mark.timeout(900)]


def call(*command: object, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


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


def test_what_is_built_carries_the_commit_and_whether_files_differ_from_it(tmp_path):
    """From a clone: wheel, source distribution, and the wheel that is built from that."""
    clone = tmp_path / "clone"
    call("git", "clone", "-q", ROOT, clone, cwd=tmp_path)
    for name in ("hatch_build.py", "pyproject.toml", "nerve/storage/provenance.py"):
        (clone / name).write_text((ROOT / name).read_text())
    user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    call("git", *user, "commit", "-q", "--all", "--allow-empty", "-m", "as here", cwd=clone)
    commit = call("git", "rev-parse", "HEAD", cwd=clone)
    build = [sys.executable, "-m", "build", "--outdir"]
    call(*build, tmp_path / "clean", clone, cwd=tmp_path)  # sdist, and the wheel from it
    built = sorted((tmp_path / "clean").iterdir())
    assert [path.suffix for path in built] == [".whl", ".gz"]
    assert [commit_in(path) for path in built] == [commit, commit]
    assert call("git", "status", "--porcelain", cwd=clone) == ""
    with open(clone / "nerve" / "errors.py", "a") as file:
        file.write("# changed\n")
    call(*build, tmp_path / "changed", "--wheel", clone, cwd=tmp_path)
    (wheel,) = (tmp_path / "changed").iterdir()
    assert commit_in(wheel) == commit.strip() + "+\n"


def test_the_wheel_runs_in_a_new_environment_and_an_empty_directory(wheel, tmp_path):
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    call(sys.executable, "-m", "venv", environment, cwd=empty)
    python = environment / "bin" / "python"
    call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=empty)
    out = call(
        environment / "bin" / "nerve-run",
        "model.n_layers=2",
        "model.d_model=32",
        "model.n_heads=2",
        "trainer.max_steps=3",
        "monitor.every_n_steps=2",
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
