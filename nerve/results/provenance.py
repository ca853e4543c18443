"""What code a run used: the versions of the packages that decide numbers, and the commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("nerve", "torch", "lightning", "hydra-core", "numpy", "pyarrow", "tokenizers")


def package_versions() -> dict[str, str]:
    """Python's version and those of `PACKAGES` that are installed; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` when files differ from it.

    None for an installed package, also where a repository of something else is around it.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        changed = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")


def cluster_job() -> dict[str, str] | None:
    """SLURM's names for the job that this process is part of; None outside of one."""
    names = {
        "id": "SLURM_JOB_ID",
        "array_id": "SLURM_ARRAY_JOB_ID",
        "array_task": "SLURM_ARRAY_TASK_ID",
        "restarts": "SLURM_RESTART_COUNT",
    }
    job = {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}
    return {"scheduler": "slurm", **job} if "id" in job else None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=10)
    return result.stdout.strip()
