"""The rules of the house: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nerve"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room (a prefix of the module's name) to what it must not import.
FORBIDDEN = {
    "nerve.spectra": ("lightning", "nerve.nn", "nerve.models", "nerve.results", "torch.nn"),
    "nerve.nn": ("lightning", "nerve.models", "nerve.optim", "nerve.probe", "nerve.results"),
    "nerve.models": ("lightning", "nerve.optim", "nerve.probe", "nerve.results"),
    "nerve.optim": ("lightning", "nerve.nn", "nerve.models", "nerve.results"),
    "nerve.data": ("nerve.nn", "nerve.models", "nerve.optim", "nerve.results", "nerve.probe"),
    "nerve.probe": ("lightning", "nerve.nn", "nerve.models", "nerve.spectra", "nerve.results"),
    "nerve.measurement": ("lightning", "nerve.nn", "nerve.models", "nerve.results"),
    "nerve.monitor": ("nerve.nn", "nerve.models", "nerve.data"),
    "nerve.results": (
        "torch",
        "lightning",
        "nerve.spectra",
        "nerve.nn",
        "nerve.models",
        "nerve.optim",
        "nerve.data",
        "nerve.probe",
        "nerve.measurement",
        "nerve.monitor",
        "nerve.module",
    ),
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


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down_the_walk(path):
    module, imported = module_name(path), imports(path)
    for room, forbidden in FORBIDDEN.items():
        if within(module, room):
            wrong = {name for name in imported for other in forbidden if within(name, other)}
            assert not wrong, f"{module} must not import {wrong}"
    if not within(module, "nerve.cli"):
        wrong = {
            n
            for n in imported
            if within(n, "hydra") or within(n, "omegaconf") or within(n, "nerve.cli")
        }
        assert not wrong, f"only nerve.cli knows Hydra; {module} imports {wrong}"


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
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = nerve.nothing
