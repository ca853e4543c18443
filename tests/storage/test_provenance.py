"""Versions and commit of the code that ran."""

import subprocess
import sys
from importlib.metadata import PathDistribution, version
from pathlib import Path

import pytest
from archives import unpack

from nerve.storage import provenance

ROOT = Path(__file__).parents[2]


def test_versions_are_those_installed(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("pyarrow", "no-such-package-as-this"))
    versions = provenance.package_versions()
    assert versions.keys() == {"python", "pyarrow"}
    assert versions["pyarrow"] == version("pyarrow")


def test_the_packages_are_by_names_that_the_index_knows():
    """A misspelled name would be skipped like a package that is not installed."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert set(provenance.PACKAGES) - {"nerve"} <= pins


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A checkout with this package's files as its commit; `call` runs git in it."""

    def call(*arguments: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        command = ["git", "-C", str(folder), *user, *arguments]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return result.stdout.strip()

    folder = tmp_path / "checkout"
    for name in (".gitattributes", "nerve/_commit.txt", "nerve/storage/provenance.py"):
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / name).read_text())
    call("init", "-q")
    monkeypatch.setattr(provenance, "__file__", str(folder / "nerve/storage/provenance.py"))
    return folder, call


def test_commit_of_the_checkout_and_of_nothing_else(repository, tmp_path, monkeypatch):
    """Of the repository that contains the package, marked if changed; not of one further up."""
    folder, git = repository
    assert provenance.git_commit() is None, "no commit yet"
    git("add", ".")
    git("commit", "-q", "-m", "one")
    assert provenance.git_commit() == git("rev-parse", "HEAD")
    (folder / ".gitattributes").write_text("# no code")
    assert provenance.git_commit() == git("rev-parse", "HEAD")
    (folder / "nerve" / "storage" / "provenance.py").write_text("2")
    assert provenance.git_commit() == git("rev-parse", "HEAD") + "+"
    for installed in (folder / "venv/nerve/storage/p.py", tmp_path / "nerve/storage/p.py"):
        monkeypatch.setattr(provenance, "__file__", str(installed))
        assert provenance.git_commit() is None


def test_an_archive_carries_its_commit(repository, tmp_path):
    """Unpacked outside of any repository, and asked in a separate process."""
    folder, git = repository
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    git("archive", "--output", str(tmp_path / "a.tar"), "HEAD")
    (folder / "later").write_text("a")
    git("add", ".")
    git("commit", "-q", "-m", "two")
    unpack(tmp_path / "a.tar", tmp_path / "unpacked")
    script = "import runpy, sys; print(runpy.run_path(sys.argv[1])['git_commit']())"
    path = tmp_path / "unpacked" / "nerve" / "storage" / "provenance.py"
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert result.stdout == f"{commit}\n", result.stderr


@pytest.fixture
def unpacked(repository, tmp_path, monkeypatch):
    """The folder of an unpacked archive, and its commit."""
    folder, git = repository
    (folder / ".gitignore").write_text("__pycache__/\n/outputs/\n")
    (folder / "run").write_text("a")
    (folder / "run").chmod(0o755)
    git("add", ".")
    git("commit", "-q", "-m", "one")
    git("archive", "--output", str(tmp_path / "a.tar"), "HEAD")
    unpack(tmp_path / "a.tar", tmp_path / "unpacked")
    path = tmp_path / "unpacked" / "nerve" / "storage" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(path))
    return tmp_path / "unpacked", git("rev-parse", "HEAD")


def test_an_archive_that_ran_is_still_that_of_its_commit(unpacked):
    folder, commit = unpacked
    for ignored in ("nerve/__pycache__/a.pyc", "outputs/a/run.json"):
        (folder / ignored).parent.mkdir(parents=True)
        (folder / ignored).write_text("a")
    assert provenance.git_commit() == commit


@pytest.mark.parametrize("change", ["edited", "added", "removed", "mode", "another commit"])
def test_an_archive_whose_files_were_changed_says_so(unpacked, change):
    folder, commit = unpacked
    if change == "edited":
        (folder / "run").write_text("b")
    elif change == "added":
        (folder / "nerve" / "more.py").write_text("")
    elif change == "removed":
        (folder / "run").unlink()
    elif change == "mode":
        (folder / "run").chmod(0o644)
    else:
        file = folder / "nerve" / "_commit.txt"
        file.write_text(f"{commit} {'a1' * 20}\n")
    assert provenance.git_commit() == commit + "+"


def test_without_git_nothing_says_whether_an_archive_was_changed(unpacked, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == unpacked[1] + "?"


def test_the_placeholder_is_what_the_repository_has():
    assert (ROOT / "nerve" / "_commit.txt").read_text() == provenance.PLACEHOLDER


@pytest.mark.parametrize("change", [None, "nerve/storage/more.py", "conf/a.yaml", "notes"])
def test_a_source_distribution_has_a_digest_of_its_code(unpacked, change):
    """Of code and configuration, whatever other files are there."""
    folder, commit = unpacked
    (folder / "conf").mkdir()
    digest = provenance.files_digest(folder)
    (folder / "nerve" / "_commit.txt").write_text(f"{commit} sha256:{digest}\n")
    if change:
        (folder / change).write_text("a")
    assert provenance.git_commit() == commit + ("+" if change and "/" in change else "")


@pytest.mark.parametrize("change", [None, "edited", "removed"])
def test_an_installed_wheel_is_compared_with_its_record(unpacked, change, monkeypatch):
    folder, commit = unpacked
    (folder / "nerve" / "_commit.txt").write_text(f"{commit}\n")
    (folder / "nerve" / "a.py").write_text("a")
    names = ["nerve/_commit.txt", "nerve/a.py", "nerve/storage/provenance.py"]
    lines = [f"{name},sha256={provenance._sha256(folder / name)},1" for name in names]
    info = folder / "nerve-1.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text("\n".join([*lines, "nerve/__pycache__/a.pyc,,"]))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nerve\nVersion: 1.0\n")
    monkeypatch.setattr(provenance, "distribution", lambda name: PathDistribution(info))
    if change == "edited":
        (folder / "nerve" / "a.py").write_text("b")
    elif change == "removed":
        (folder / "nerve" / "a.py").unlink()
    assert provenance.git_commit() == commit + ("+" if change else "")


@pytest.mark.parametrize(
    ("text", "commit"),
    [
        ("$Format:%H$\n", None),
        ("", None),
        ("main\n", None),
        (f"{'a1' * 20}\n", f"{'a1' * 20}?"),
        (f"{'a1' * 20}?\n", f"{'a1' * 20}?"),
        (f"{'a1' * 20}+\n", f"{'a1' * 20}+"),
        (f"{'a1' * 32}\n", f"{'a1' * 32}?"),
    ],
)
def test_what_a_file_carries_is_a_commit_or_nothing(text, commit, tmp_path, monkeypatch):
    """Outside of a repository: the placeholder of a copied tree says nothing; a commit alone is
    that of a wheel, which is not installed here."""
    (tmp_path / "nerve").mkdir()
    (tmp_path / "nerve" / "_commit.txt").write_text(text)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "nerve/storage/provenance.py"))
    assert provenance.git_commit() == commit


def test_an_archive_in_another_repository_has_the_commit_that_it_carries(repository):
    folder, git = repository
    (folder / "nerve" / "_commit.txt").write_text("a1" * 20)
    git("add", ".")
    git("commit", "-q", "-m", "of something else")
    assert provenance.git_commit() == "a1" * 20 + "?"


def test_a_checkout_is_asked_once_and_its_index_is_never_locked(repository, monkeypatch):
    """Each question takes a process at each start; a locked index would stop the user's commands.
    An index that is out of date is not written either."""
    folder, git = repository
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (folder / "nerve" / "_commit.txt").touch()
    before = (folder / ".git" / "index").read_bytes()
    calls, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **options: calls.append(args) or run(*args, **options)
    )
    assert provenance.git_commit() is not None
    assert len(calls) == 1
    assert (folder / ".git" / "index").read_bytes() == before


@pytest.mark.parametrize("folder", ["nerve/storage", "conf/activation", "sweeps"])
def test_an_untracked_file_counts_in_the_folders_of_the_code(repository, folder):
    checkout, git = repository
    git("add", ".")
    git("commit", "-q", "-m", "one")
    (checkout / "notes").write_text("my own")
    assert provenance.git_commit() == git("rev-parse", "HEAD")
    (checkout / folder).mkdir(parents=True, exist_ok=True)
    (checkout / folder / "new").write_text("")
    assert provenance.git_commit() == git("rev-parse", "HEAD") + "+"


def test_another_repository_in_the_environment_is_not_asked(repository, monkeypatch, tmp_path):
    _, git = repository
    git("add", ".")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    assert provenance.git_commit() == commit


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC "
            "2023\nGCC version:  gcc version 12.3.0\n",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
            "570.86.15",
        ),
        ("something else 1.2", None),
        (None, None),
    ],
)
def test_the_driver_is_what_the_kernel_says(text, driver, tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "DRIVER_FILE", tmp_path / "version")
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert provenance.nvidia_driver() == driver


def test_a_job_of_slurm_has_the_names_that_slurm_gave_it(monkeypatch):
    for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    assert provenance.cluster_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert provenance.cluster_job() == {"scheduler": "slurm", "id": "17"}
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job = {"scheduler": "slurm", "id": "17", "array_id": "15", "array_task": "2", "restarts": "1"}
    assert provenance.cluster_job() == job
