"""A report replaces an earlier one once it is complete, wherever its writer is killed."""

import os
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from nerve.errors import StoreError
from nerve.report.content import Content, Drawing, Table
from nerve.report.write import write_report

Write = Callable[..., None]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """Writes a report with some figures, and a table for each, into `<tmp_path>/report`."""

    def call(title: str, names: str = "ab", progress=lambda *told: None) -> None:
        drawings = [Drawing(name, title, Figure) for name in names]
        tables = [Table(name, title, pd.DataFrame({"of": [title]})) for name in names]
        content = Content(title, drawings=drawings, tables=tables)
        monkeypatch.setattr("nerve.report.write.gather", lambda *args, **kwargs: content)
        write_report(tmp_path, tmp_path / "report", progress=progress)

    return call


def seen(folder: Path) -> dict[str, bytes]:
    """What a reader finds: all files that are not hidden."""
    relative = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path): (folder / path).read_bytes() for path in relative if str(path)[0] != "."}


def files(names: str) -> set[str]:
    figures = {f"figures/{name}.{end}" for name in names for end in ("png", "svg")}
    tables = {f"tables/{name}.{end}" for name in names for end in ("csv", "parquet")}
    return {"index.html"} | figures | tables


def test_an_earlier_report_stays_until_the_new_one_is_complete(write, tmp_path):
    """At each step, and therefore also if the writer is killed there; then files that only the old
    report had are removed."""
    write("earlier", "abc")
    earlier, steps = seen(tmp_path / "report"), []

    def look(what: str, done: int, total: int) -> None:
        steps.append(what)
        assert what == "done" or seen(tmp_path / "report") == earlier

    (tmp_path / "report" / "figures" / "my notes.txt").write_text("kept")
    earlier["figures/my notes.txt"] = b"kept"
    write("later", "abd", look)
    assert len(steps) == 8
    later = seen(tmp_path / "report")
    assert later.keys() == files("abd") | {"figures/my notes.txt"}
    assert b"later" in later["index.html"]
    assert b"later" in later["tables/a.csv"]
    assert list((tmp_path / "report").glob(".*")) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_failed_report_leaves_nothing_behind(write, tmp_path, error, is_first):
    if not is_first:
        write("earlier")
    earlier = seen(tmp_path / "report")

    def stop(what: str, done: int, total: int) -> None:
        if what == "writing tables" and done == 3:  # the second one, after two figures
            raise error

    with pytest.raises(StoreError if isinstance(error, OSError) else KeyboardInterrupt):
        write("later", progress=stop)
    assert seen(tmp_path / "report") == earlier
    assert list((tmp_path / "report").glob(".*")) == []
    write("later")
    assert seen(tmp_path / "report").keys() == files("ab")


@pytest.mark.parametrize("n_moved", range(len(files("ab"))))
@pytest.mark.parametrize("is_first", [True, False])
def test_a_report_killed_while_it_is_moved_into_place_is_replaced_by_the_next(
    write, tmp_path, monkeypatch, is_first, n_moved
):
    """A kill removes nothing: next to the files that were moved, the folder with the others
    remains. The page is the earlier one until all files are there."""
    folder = tmp_path / "report"
    if not is_first:
        write("earlier")
    moved, real = [], os.replace

    def killed(source: Path, target: Path) -> None:
        if len(moved) == n_moved:
            raise KeyboardInterrupt
        moved.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(KeyboardInterrupt):
            write("later")
    assert len(list(folder.glob(".new-report-*"))) == 1
    if not is_first:
        assert seen(folder).keys() == files("ab")
        assert b"earlier" in seen(folder)["index.html"]
    write("next", "a")
    assert seen(folder).keys() == files("a")
    assert b"next" in seen(folder)["index.html"]
    assert list(folder.glob(".*")) == []


def test_a_folder_that_is_not_a_report_is_left_unchanged(write, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("<p>my own page")
    with pytest.raises(StoreError, match="may only replace an earlier report"):
        write("later")
    assert seen(tmp_path / "report") == {"index.html": b"<p>my own page"}
