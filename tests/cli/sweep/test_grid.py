"""Where the run of a trial is, of those that its sweep's folder holds."""

import pytest

from nerve.cli.sweep.grid import StoredRuns
from nerve.storage.identity import config_id
from nerve.storage.record import RunRecord
from nerve.storage.state import RunLock


def test_runs_are_found_by_what_they_ran_and_the_one_to_take_comes_first(tmp_path, capsys):
    """Done, then at work, then the furthest, then the last heard of; only directly below."""
    config = {"seed": 1}
    for name, run_status, step in (
        ("a", "interrupted", 10),
        ("b", "failed", 20),
        ("c", "running", 5),
        ("d", "done", 1),
    ):
        RunRecord.create(tmp_path / name, config).update(run_status=run_status, step=step)
    other = RunRecord.create(tmp_path / "other", {"seed": 2})
    for name in (".hidden", "a/inside"):
        RunRecord.create(tmp_path / name, config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    lock = RunLock(tmp_path / "c")
    stored = StoredRuns()
    new = stored.at(tmp_path / "new")
    assert stored.run_of(new, config_id(config)) is stored.at(tmp_path / "d")
    assert stored.run_of(new, other.config_id) is stored.at(tmp_path / "other")
    assert stored.run_of(new, config_id({"seed": 3})) is new
    lock.release()
    broken, several = capsys.readouterr().out.splitlines()
    assert broken.startswith(f"skipped: {tmp_path / 'broken' / 'run.json'} is not the record")
    rest = ", ".join(str(tmp_path / name) for name in "cba")
    assert several == (
        f"{tmp_path / 'd'} (done, step 1) counts; of the same configuration, and left as they are: "
        f"{rest}"
    )


def test_a_folder_that_is_not_there_holds_no_run(tmp_path):
    stored = StoredRuns()
    own = stored.at(tmp_path / "nowhere" / "0123456789ab")
    assert stored.run_of(own, "0123456789ab") is own


@pytest.mark.parametrize("run_status", ["done", "running"])
def test_a_run_that_is_done_or_at_work_under_its_own_name_stays(tmp_path, capsys, run_status):
    """What is beside it is not even read: of the broken record nothing is said."""
    RunRecord.create(tmp_path / "beside", {"seed": 1}).finish("done", step=9)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    record = RunRecord.create(tmp_path / "own", {"seed": 1})
    record.update(run_status=run_status)
    lock = RunLock(tmp_path / "own")
    stored = StoredRuns()
    own = stored.at(tmp_path / "own")
    assert stored.run_of(own, record.config_id) is own
    assert capsys.readouterr().out == ""
    lock.release()
