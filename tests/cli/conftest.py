"""The command, called as a user calls it."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nerve.cli.run import main


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """Hydra's handlers write to the stdout of this test; they must not outlive it."""
    root = logging.getLogger()
    before, level = root.handlers.copy(), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    _own_logging: None,
) -> Callable[..., tuple[int, str, str]]:
    """Calls `nerve-run` in an empty directory; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nerve-run", *arguments])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        status = 0
        try:
            main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
