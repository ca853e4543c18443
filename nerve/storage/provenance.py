"""What code a run used: the versions of the packages that decide numbers, and the commit.

It imports the standard library alone, as the build of a wheel asks it, too.
"""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "nerve",
    # Training and what it is told.
    *("torch", "triton", "lightning", "hydra-core", "omegaconf", "pytorch-optimizer"),
    # Data.
    *("tokenizers", "datasets", "huggingface-hub", "pillow", "scikit-learn"),
    # Spectra and how they are stored.
    *("numpy", "pyarrow"),
)
"""Packages whose version a result may depend on."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")

COMMIT_FILE = "_commit.txt"
"""In the package: the commit that an archive or a wheel was made from. `git archive` writes it
(.gitattributes), and so does the build of a wheel (hatch_build.py); a checkout has a placeholder.
"""


def package_versions() -> dict[str, str]:
    """Python's version and those of `PACKAGES` that are installed; imports none of them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, as Linux has it; None where there is none."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", text)
    return found[1] if found else None


def git_commit() -> str | None:
    """The commit that this package is of, `+` when files differ from it; None if none is known.

    What was installed from an archive or a wheel carries it, whatever repository it lies in; that
    its files were not changed afterwards is not known. A checkout says it itself: of files that git
    does not track those count that lie beside the code and its configuration.
    """
    package = Path(__file__).resolve().parents[1]
    return _carried(package) or _of_checkout(package)


def _carried(package: Path) -> str | None:
    try:
        text = (package / COMMIT_FILE).read_text().strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{40,64}\+?", text) else None


def _of_checkout(package: Path) -> str | None:
    checkout = package.parent
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        tracked = _git(checkout, "status", "--porcelain", "--untracked-files=no")
        beside = _git(checkout, "status", "--porcelain", "--", "nerve", "conf", "sweeps")
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if tracked or beside else "")


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
    # A hook of git, and some servers, name another repository in the environment.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10, env=own
    )
    return result.stdout.strip()
