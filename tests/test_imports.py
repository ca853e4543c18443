"""The import rules: which folder may import which, and which modules stay light."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nerve"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {
    *("errors", "config", "files", "cores", "shared_context"),
    *("progress", "sites_and_groups", "metric_names", "derived", "spectra"),
}
"""What every folder may import, so far as it stands above it."""

# Folder (or file at the root) to what of nerve it may import beside itself.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "files": {"errors"},
    "cores": set(),
    "shared_context": set(),
    "progress": set(),
    "sites_and_groups": set(),
    "metric_names": {"sites_and_groups"},
    "derived": {"metric_names", "sites_and_groups"},
    "spectra": {"errors", "shared_context"},
    "nn": BASE - {"derived"},
    "models": BASE | {"nn"},
    "optim": BASE,
    "data": BASE,
    "measuring": BASE,
    "storage": BASE - {"spectra"},
    "recording": BASE | {"measuring", "storage", "optim"},
    "training": BASE | {"measuring", "storage", "recording", "optim", "models", "data"},
    "integrations": BASE | {"measuring", "storage", "recording"},
    "analysis": BASE - {"spectra"} | {"storage"},
    "report": BASE - {"spectra"} | {"storage", "analysis"},
}

# Of the commands, folder or file to what of nerve/cli it may import beside itself.
OF_COMMANDS = {
    "console": set(),
    "directories": set(),
    "saved": set(),
    "text_table": {"console"},
    "status_table": {"console", "text_table"},
    "config": {"saved"},
    "experiment": {"config", "console", "directories"},
    "sweep": {"config", "console", "directories", "experiment"},
    "queued": {"sweep"},
    "probing": {"console", "directories", "experiment"},
    "entry": set(),
    "run": {"config", "console", "entry", "experiment", "sweep"},
    "probe": {"console", "entry", "probing"},
    "report": {"console", "entry"},
    "status": {"console", "entry", "queued", "saved", "status_table"},
}

# Folder to what it must not import from elsewhere, nor through what it imports.
LIGHT = ("lightning", "torch", "matplotlib", "pandas")
WITHOUT = {
    **dict.fromkeys(("errors", "config", "files", "cores", "shared_context"), LIGHT),
    **dict.fromkeys(("progress", "sites_and_groups", "metric_names"), LIGHT),
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


CALLED = ("import_module", "__import__")
"""Functions that import what they are called with."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports(path: Path) -> frozenset[str]:
    """Every dotted name that a file imports, at any depth; relative imports are not allowed."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(CALLED):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return frozenset(names)


def within(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def folder_of(module: str) -> str:
    """`nerve.storage.record` is in `storage`."""
    return module.split(".")[1] if "." in module else ""


def place_in_cli(module: str) -> str:
    """`nerve.cli.sweep.grid` is in `sweep`; empty for modules outside of nerve/cli."""
    return module.split(".")[2] if module.startswith("nerve.cli.") else ""


def reached(modules: dict[str, frozenset[str]], start: str) -> set[str]:
    """The modules of nerve that a module imports directly or indirectly, with their packages."""
    found, waiting = set(), [start]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            packages = [module.rsplit(".", n)[0] for n in range(1, module.count("."))]
            waiting += [*packages, *(owner(modules, name) for name in modules[module])]
            waiting = [each for each in waiting if each not in ("", "nerve")]
    return found


def owner(modules: dict[str, frozenset[str]], name: str) -> str:
    """The file that an imported name is or is defined in; empty for names outside of nerve."""
    parts = name.split(".")
    tried = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((each for each in tried if each in modules), "")


def test_every_folder_has_a_rule():
    folders = {folder_of(module_name(path)) for path in FILES} - {"", "cli"}
    assert folders == set(ALLOWED)
    assert {place_in_cli(module_name(path)) for path in FILES} - {""} == set(OF_COMMANDS)


@pytest.mark.parametrize("rules", [ALLOWED, OF_COMMANDS])
def test_no_rule_allows_a_circle_of_folders(rules):
    TopologicalSorter(rules).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("folder", WITHOUT)
def test_what_a_folder_is_to_be_without_comes_by_no_way(folder):
    modules = {module_name(path): imports(path) for path in FILES}
    mine = [module for module in modules if folder_of(module) == folder]
    for module in {each for start in mine for each in reached(modules, start)}:
        wrong = {n for n in modules[module] for other in WITHOUT[folder] if within(n, other)}
        assert not wrong, f"{folder} imports {module}, which imports {wrong}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_one_way(path):
    module, imported = module_name(path), imports(path)
    folder = folder_of(module)
    ours = {name for name in imported if within(name, "nerve")}
    if folder in ALLOWED:
        allowed = ALLOWED[folder] | {folder}
        wrong = {name for name in ours if folder_of(name) not in allowed}
        assert not wrong, f"{folder} must not import {wrong}"
    if (place := place_in_cli(module)) != "":
        allowed = OF_COMMANDS[place] | {place, ""}
        wrong = {name for name in ours if place_in_cli(name) not in allowed}
        assert not wrong, f"cli/{place} must not import {wrong}"
    forbidden = () if folder == "cli" else ("hydra", "omegaconf", "nerve.cli")
    wrong = {name for name in imported for other in forbidden if within(name, other)}
    assert not wrong, f"{folder or module} must not import {wrong}"


def test_no_two_files_import_each_other():
    graph = {module_name(path): imports(path) for path in FILES}
    edges = {
        module: {owner(graph, name) for name in names} - {module, "", "nerve"}
        for module, names in graph.items()
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
    assert nerve.__version__ == version("nerve")
    with pytest.raises(AttributeError, match="No nerve attribute nothing"):
        _ = nerve.nothing
