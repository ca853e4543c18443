"""The import rules: which folder may import which, and what stays light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nerve"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"errors", "config", "files", "cores", "progress", "metric_names", "outliers", "spectra"}
"""What every folder may import, so far as it stands above it."""

# Folder (or file at the root) to what of nerve it may import beside itself.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "cores": set(),
    "progress": set(),
    "metric_names": set(),
    "outliers": {"metric_names"},
    "spectra": {"errors"},
    "nn": BASE - {"outliers"},
    "models": BASE | {"nn"},
    "optim": BASE,
    "data": BASE,
    "measuring": BASE,
    "storage": BASE - {"spectra"},
    "recording": BASE | {"measuring", "storage"},
    "training": BASE | {"measuring", "storage", "recording", "optim", "models"},
    "integrations": BASE | {"measuring", "storage", "recording"},
    "analysis": BASE - {"spectra"} | {"storage"},
    "report": BASE - {"spectra"} | {"storage", "analysis"},
}

# Folder to what it must not import from elsewhere, nor through what it imports.
WITHOUT = {
    "spectra": ("lightning", "torch.distributed"),
    "nn": ("lightning",),
    "models": ("lightning",),
    "optim": ("lightning",),
    "measuring": ("lightning",),
    "storage": ("lightning", "torch", "matplotlib"),
    "recording": ("lightning",),
    "integrations": ("lightning",),
    "analysis": ("lightning", "torch", "matplotlib"),
    "report": ("lightning", "torch"),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every dotted name that a file imports, at any depth; relative imports count as a fault."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def folder_of(module: str) -> str:
    """`nerve.storage.record` is in `storage`."""
    return module.split(".")[1] if "." in module else ""


def test_every_folder_has_a_rule():
    folders = {folder_of(module_name(path)) for path in FILES} - {"", "cli"}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    module, imported = module_name(path), imports(path)
    folder = folder_of(module)
    ours = {name for name in imported if within(name, "nerve")}
    if folder in ALLOWED:
        allowed = ALLOWED[folder] | {folder}
        wrong = {name for name in ours if folder_of(name) not in allowed}
        assert not wrong, f"{folder} must not import {wrong}"
    forbidden = WITHOUT.get(folder, ())
    if folder != "cli":
        forbidden = (*forbidden, "hydra", "omegaconf", "nerve.cli")
    wrong = {name for name in imported for other in forbidden if within(name, other)}
    assert not wrong, f"{folder or module} must not import {wrong}"


def test_no_two_files_import_each_other():
    graph = {module_name(path): imports(path) for path in FILES}
    modules = sorted(graph, key=len, reverse=True)
    edges = {
        module: {next((m for m in modules if within(name, m)), "") for name in names} - {module}
        for module, names in graph.items()
    }
    edges = {
        module: {name for name in names if name not in ("", "nerve")}
        for module, names in edges.items()
    }
    TopologicalSorter(edges).prepare()  # raises CycleError, which names the circle


def loaded_by(code: str) -> set[str]:
    code += "; import sys; print(*sorted(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in result.stdout.split()}


@pytest.mark.parametrize(
    "code", ["import nerve", "from nerve import load_runs, load_metrics, load_spectra"]
)
def test_reading_runs_needs_neither_torch_nor_lightning(code):
    assert not loaded_by(code) & {"torch", "lightning", "pytorch_lightning", "hydra", "omegaconf"}


def test_the_command_imports_torch_only_when_it_runs_something():
    assert not loaded_by("import nerve.cli.run") & {"torch", "lightning", "pandas"}


def test_the_names_of_the_package_are_there():
    import nerve

    assert set(nerve.__all__) <= set(dir(nerve))
    assert all(callable(getattr(nerve, name)) for name in nerve.__all__)
    with pytest.raises(AttributeError, match="No nerve attribute nothing"):
        _ = nerve.nothing
