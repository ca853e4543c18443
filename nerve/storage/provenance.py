"""The code that a run used: the versions of the packages that affect results, and the commit.

Imports only the standard library, because building a wheel uses it, too.
"""

import base64
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

PACKAGES = (
    "nerve",
    # Training and its configuration.
    *("torch", "triton", "lightning", "hydra-core", "omegaconf", "pytorch-optimizer"),
    # Data.
    *("tokenizers", "datasets", "huggingface-hub", "pillow", "scikit-learn"),
    # Spectra and their storage.
    *("numpy", "pyarrow"),
)
"""Packages whose versions may affect a result."""

CODE = ("nerve", "conf", "sweeps")
"""Folders of the repository that determine what a run does."""

DRIVER_FILE = Path("/proc/driver/nvidia/version")

COMMIT_FILE = "_commit.txt"
"""A file in the package with the commit from which it was built. `git archive` writes it with the
commit's tree (.gitattributes), the build of a source distribution with a digest of its files, and
the build of a wheel with the commit alone (hatch_build.py); a checkout has a placeholder.
"""

PLACEHOLDER = "$Format:%H %T$\n"
"""The contents of `COMMIT_FILE` in the repository."""


def package_versions() -> dict[str, str]:
    """The versions of Python and of the installed `PACKAGES`, without importing them."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver according to Linux; None if there is none."""
    try:
        text = DRIVER_FILE.read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d[\d.]*)", text)
    return found[1] if found else None


def git_commit() -> str | None:
    """The commit of this package's code; None if it is unknown.

    It is followed by `+` if files differ from the commit, and by `?` if this is unknown. A packed
    copy carries its commit, whatever repository it lies in, and its files are compared with what
    was packed: those of `git archive` with the commit's tree, if git is available (all files count
    that .gitignore does not exclude), those of a source distribution with its digest, and those of
    an installed wheel with its record. In a checkout git is asked; only the folders of `CODE`
    count, including their untracked files.
    """
    package = Path(__file__).resolve().parents[1]
    return _carried(package) or _of_checkout(package)


def _carried(package: Path) -> str | None:
    try:
        text = (package / COMMIT_FILE).read_text().strip()
    except OSError:
        return None
    found = re.fullmatch(r"([0-9a-f]{40,64})([+?]?)(?: (sha256:)?([0-9a-f]{40,64}))?", text)
    if found is None:
        return None
    commit, mark, is_digest, packed = found.groups()
    if packed is None:
        same = _is_as_installed(package)
    elif is_digest:
        same = files_digest(package.parent) == packed
    else:
        same = _is_tree(package.parent, packed)
    return commit + (mark if same else {False: "+", None: mark or "?"}[same])


def files_digest(root: Path) -> str:
    """SHA-256 of the names and contents of all files in the folders of `CODE` below `root`."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((root / folder).rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and path.name != COMMIT_FILE and "/__pycache__/" not in name:
                digest.update(f"{name}\0{_sha256(path)}\n".encode())
    return digest.hexdigest()


def _is_as_installed(package: Path) -> bool | None:
    """Whether the files of an installed package are unchanged; None if it was not installed, or not
    from a wheel."""
    try:
        files = distribution("nerve").files or []
    except PackageNotFoundError:
        return None
    code = [file for file in files if file.hash is not None and file.parts[0] == package.name]
    if not any(Path(file.locate()).resolve() == Path(__file__).resolve() for file in code):
        return None
    try:
        return all(file.hash.value == _sha256(Path(file.locate())) for file in code if file.hash)
    except OSError:
        return False


def _sha256(path: Path) -> str:
    """The hash of a file as RECORD contains it."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _is_tree(folder: Path, tree: str) -> bool | None:
    """Whether the files in a folder are those of a git tree; None without git."""
    with tempfile.TemporaryDirectory() as repository:
        own = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_DIR": repository}
        placeholder = Path(repository, COMMIT_FILE)
        placeholder.write_text(PLACEHOLDER)
        file = f"nerve/{COMMIT_FILE}"
        try:
            _git(folder, "init", "-q", **own)
            own |= {"GIT_WORK_TREE": str(folder)}
            _git(folder, "add", "--all", **own)
            blob = _git(folder, "hash-object", "-w", "--no-filters", str(placeholder), **own)
            _git(folder, "update-index", "--cacheinfo", f"100644,{blob},{file}", **own)
            return _git(folder, "write-tree", **own) == tree
        except (OSError, subprocess.SubprocessError):
            return None


def _of_checkout(package: Path) -> str | None:
    checkout = package.parent
    if not (checkout / ".git").exists():
        return None
    how = ("--porcelain=v2", "--branch", "--untracked-files=normal", "--", *CODE)
    try:
        # Without locks, so that a git command of the user never finds the index locked.
        status = _git(checkout, "status", *how, GIT_OPTIONAL_LOCKS="0").splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    headers = [line for line in status if line.startswith("# ")]
    found = re.search(r"^# branch\.oid ([0-9a-f]+)$", "\n".join(headers), re.MULTILINE)
    return found and found[1] + ("+" if len(status) > len(headers) else "")


def cluster_job() -> dict[str, str] | None:
    """SLURM's names for the job that this process belongs to; None outside of a job."""
    names = {
        "id": "SLURM_JOB_ID",
        "array_id": "SLURM_ARRAY_JOB_ID",
        "array_task": "SLURM_ARRAY_TASK_ID",
        "restarts": "SLURM_RESTART_COUNT",
    }
    job = {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}
    return {"scheduler": "slurm", **job} if "id" in job else None


def _git(checkout: Path, *arguments: str, **environment: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    # Git hooks and some servers set another repository in the environment.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    result = subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=10, env=own | environment
    )
    return result.stdout.strip()
