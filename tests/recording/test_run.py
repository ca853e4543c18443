"""What the other processes of a run hear when the one that records cannot begin."""

import pytest

from nerve.recording import run
from nerve.recording.run import recorded_run
from nerve.storage.directory import RunDirectory


def test_the_others_are_told_of_any_error_before_the_block(tmp_path, monkeypatch):
    """Otherwise they would wait for this process, which has left, for half an hour."""
    told: list[BaseException] = []
    monkeypatch.setattr(run, "leave", told.append)

    def locked(self: RunDirectory) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "locked", locked)
    with pytest.raises(KeyboardInterrupt) as error, recorded_run(tmp_path, {}, goes_on=False):
        pass
    assert told == [error.value]
