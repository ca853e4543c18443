"""`nerve-report`, as a user calls it."""

import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nerve.cli.report import main
from nerve.storage.record import RunRecord
from nerve.storage.store import RunStore

Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Report:
    """Calls `nerve-report` in an empty directory; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        status = 0
        try:
            main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def run(tmp_path: Path) -> RunRecord:
    """A run that failed before anything was measured, with one logged value."""
    record = RunRecord.create(tmp_path / "outputs" / "a", {"seed": 0}, seed=0)
    store = RunStore(record.directory, record.run_id)
    store.append_scalars([{"step": 1, "name": "train_loss", "value": 5.0}])
    store.flush(1)
    record.finish("failed", ValueError("no memory"))
    return record


def test_a_report_is_written_next_to_the_path_with_progress(report, run, tmp_path):
    status, out, err = report("outputs/a")
    assert status == 0
    assert out == f"report: {tmp_path}/outputs/report/index.html\n"
    assert (tmp_path / "outputs" / "report" / "index.html").is_file()
    assert report("outputs/a")[1].endswith("index.html (replaces an earlier one)\n")
    lines = err.splitlines()
    assert lines[0] == "0/3 reading runs"
    tasks = [line.partition(" ")[2] for line in lines]
    assert tasks.count("drawing figures") == tasks.count("writing tables") == 1
    done, total = lines[-1].split()[0].split("/")
    assert done == total


def test_the_folder_can_be_chosen(report, run, tmp_path):
    assert report("outputs", "-o", "there/page", "--window", "all", "--steps", "0,10")[0] == 0
    assert (tmp_path / "there" / "page" / "index.html").is_file()
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nerve-report: Runs are read from directories; there is none at nowhere."),
        (["empty"], "nerve-report: A run directory contains run.json; none was found under empty."),
        (["outputs", "-o", "empty/../outputs"], "outputs contains something else."),
        (["outputs", "--window", "warmup"], "window must be one of all, after_warmup, differences"),
    ],
)
def test_mistakes_are_one_message(report, run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    status, out, err = report(*arguments)
    assert status == 1
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_steps_must_be_numbers(report, run):
    status, _, err = report("outputs", "--steps", "first")
    assert status == 2
    assert "--steps: whole numbers separated by commas, such as 0,100,400; got 'first'" in err


def test_help_is_fast_and_loads_nothing_heavy():
    """40 ms of a core; pandas and matplotlib alone take a second."""
    code = (
        "import sys; from nerve.cli.report import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print({'pandas', 'matplotlib', 'torch', 'hydra'} & set(sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
    assert "usage: nerve-report" in result.stdout
    assert result.stdout.splitlines()[-1] == "set()"
