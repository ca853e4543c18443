"""An error of the process that records a run reaches the other processes."""

import pytest

from nerve.recording import run
from nerve.recording.run import recorded_run
from nerve.storage.directory import RunDirectory


def test_an_error_before_the_block_is_sent_to_the_other_processes(tmp_path, monkeypatch):
    """Otherwise they would wait half an hour for a process that has left."""
    told: list[BaseException] = []
    monkeypatch.setattr(run, "leave", told.append)

    def locked(self: RunDirectory) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "locked", locked)
    with pytest.raises(KeyboardInterrupt) as error, recorded_run(tmp_path, {}, goes_on=False):
        pass
    assert told == [error.value]
