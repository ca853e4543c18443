"""The driver of the faults on a toy package: found after a move, put in, run, left no trace."""

import importlib
import sys
from pathlib import Path

import pytest

SOURCE = '''"""A toy."""


class Scale:
    def half(self, x: float) -> float:
        if x < 0:
            raise ValueError(f"negative: {x + 1}")
        return x / 2

    def twice(self, x: float) -> float:
        return x * 2


def other(x: float) -> float:
    if x < 0:
        return 0.0
    return x
'''
TEST = "from nerve.{}scale import Scale\n\n\ndef test_half():\n    assert Scale().half(4) == 2\n"


@pytest.fixture
def driver(monkeypatch):
    """The modules of this folder, imported as `python tests/faults` does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    names = ("place", "table", "run", "draw")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        del sys.modules[name]


def tree(root: Path, folder: str = "") -> Path:
    package = root / "nerve" / folder
    package.mkdir(parents=True)
    (package / "scale.py").write_text(SOURCE)
    (root / "nerve" / "__init__.py").touch()
    tests = root / "tests" / folder
    tests.mkdir(parents=True)
    (tests / "test_scale.py").write_text(TEST.format(f"{folder}." if folder else ""))
    (root / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n'
        'markers = ["slow", "slurm", "install", "cuda"]\n'
    )
    return root


def test_each_fault_is_a_change_of_code_and_messages_are_none(driver, tmp_path):
    root = tree(tmp_path)
    faults = list(driver["draw"].faults_of(root / "nerve" / "scale.py", root))
    assert {(f.kind, f.function, str(f)) for f in faults} == {
        ("comparison", "Scale.half", "if x < 0:  ->  if x <= 0:"),
        ("constant", "Scale.half", "if x < 0:  ->  if x < 1:"),
        ("operator", "Scale.half", "return x / 2  ->  return x * 2"),
        ("constant", "Scale.half", "return x / 2  ->  return x / 3"),
        ("operator", "Scale.twice", "return x * 2  ->  return x / 2"),
        ("constant", "Scale.twice", "return x * 2  ->  return x * 3"),
        ("comparison", "other", "if x < 0:  ->  if x <= 0:"),
        ("constant", "other", "if x < 0:  ->  if x < 1:"),
        ("constant", "other", "return 0.0  ->  return 1.0"),
    }


def test_a_fault_is_found_after_a_move_and_caught_and_the_tree_stays(driver, tmp_path):
    before, after = tree(tmp_path / "before"), tree(tmp_path / "after", folder="moved")
    faults = driver["draw"].faults_of(before / "nerve" / "scale.py", before)
    caught, missed = [f for f in faults if f.kind == "operator"]
    run = driver["run"]
    for fault, failing in ((caught, ["tests/moved/test_scale.py::test_half"]), (missed, [])):
        with run.copy_with([fault], after) as (copy, (path,)):
            assert path == copy / "nerve" / "moved" / "scale.py"
            changed = SOURCE.replace(fault.before[0], fault.after[0])
            assert path.read_text() == changed != SOURCE
            assert run.near_tests(path, copy) == ["tests/moved/test_scale.py"]
            assert run.failing(copy, ["-x", *run.near_tests(path, copy)]) == failing
        assert not copy.exists()
        assert (after / "nerve" / "moved" / "scale.py").read_text() == SOURCE


def test_of_equal_lines_the_function_decides_and_a_place_that_is_gone_is_named(driver, tmp_path):
    root = tree(tmp_path)
    path = root / "nerve" / "scale.py"
    place, faults = driver["place"], list(driver["draw"].faults_of(path, root))
    first, second = [fault for fault in faults if fault.before == ("if x < 0:",)][::2]
    assert place.find(first, root).first == SOURCE.splitlines().index("        if x < 0:")
    assert place.find(second, root).first == SOURCE.splitlines().index("    if x < 0:")
    path.write_text(SOURCE.replace("if x < 0", "if x < -1"))
    with pytest.raises(place.PlaceError, match="place not found"):
        place.find(first, root)
    path.write_text(SOURCE)
    (root / "nerve" / "again.py").write_text(SOURCE)
    with pytest.raises(place.PlaceError, match="2 places alike"):
        place.find(driver["place"].Fault(**{**vars(first), "file": "nerve/gone.py"}), root)


def test_only_a_failing_test_counts_as_caught(driver, tmp_path):
    table = driver["table"]
    results = ("tests/test_a.py::test_b[1-x y]", *(table.NEAR_PASS, table.NOT_CAUGHT))
    results += (f"{table.NOT_FOUND}: 2 places alike",)
    rows = {i: table.Row(i, "call", "nerve/a.py: f", "f(x)", r, 1.5) for i, r in enumerate(results)}
    table.write(tmp_path / "rows.tsv", rows)
    assert table.read(tmp_path / "rows.tsv") == rows
    assert [row.caught for row in rows.values()] == [True, False, False, False]
