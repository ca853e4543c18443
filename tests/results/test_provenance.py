"""Versions and commit of the code that ran."""

import subprocess
from importlib.metadata import version

from nerve.results import provenance


def test_versions_are_those_installed(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("pyarrow", "no-such-package-as-this"))
    versions = provenance.package_versions()
    assert versions.keys() == {"python", "pyarrow"}
    assert versions["pyarrow"] == version("pyarrow")


def test_commit_of_the_checkout_and_of_nothing_else(tmp_path, monkeypatch):
    """The repository that the package lies in, marked when changed; not one further out."""
    package = tmp_path / "nerve" / "results" / "provenance.py"
    package.parent.mkdir(parents=True)
    package.write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(package))
    assert provenance.git_commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert provenance.git_commit() == head.stdout.strip()
    package.write_text("2")
    assert provenance.git_commit() == head.stdout.strip() + "+"
    installed = tmp_path / "venv" / "nerve" / "results" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(installed))
    assert provenance.git_commit() is None


def test_a_repository_without_a_commit_has_none(tmp_path, monkeypatch):
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "nerve" / "results" / "p.py"))
    assert provenance.git_commit() is None


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
