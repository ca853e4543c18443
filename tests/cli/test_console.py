"""What the commands print: numbers, and text that the terminal cannot show."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nerve.cli import probe, report, status
from nerve.cli.console import duration, error_text, figure, say
from nerve.cli.text_table import say_table
from nerve.storage.record import RunRecord


def test_a_duration_has_its_two_largest_units():
    assert [duration(seconds) for seconds in (0.2, 42, 59.6, 425, 12_000, 187_300)] == [
        *("0 s", "42 s", "1 min", "7 min 5 s", "3 h 20 min", "2 d 4 h"),
    ]


def test_an_interruption_is_named_once():
    """It follows the state of its run, interrupted."""
    stopped = {"type": "Interrupted", "message": "stopped by SIGINT"}
    failed = {"type": "ValueError", "message": "no such value"}
    found = [error_text(error) for error in (stopped, failed, None)]
    assert found == ["stopped by SIGINT", "ValueError: no such value", ""]


def test_a_number_has_three_decimals_below_10_and_one_from_there_on():
    found = [figure(value) for value in (0.0004, 1.2345, -9.9, 10, 1234.56, None, float("nan"))]
    assert found == ["0.000", "1.234", "-9.900", "10.0", "1234.6", "–", "–"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_terminal_of_ascii_gets_all_names_and_tables_that_can_be_read(monkeypatch, errors):
    """As in the locale C, whose stdout handles only undecodable bytes."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", errors))
    say("λ \udcff")
    say_table(["run"], [], [["ü"], ["–"]])
    sys.stdout.flush()
    assert written.getvalue().decode().splitlines() == [
        *("\\u03bb \\udcff", "+-----+", "| run |", "+-----+"),
        *("| \\xfc   |", "| -   |", "+-----+"),
    ]


def test_a_name_of_undecodable_bytes_is_printed_as_it_is_in_utf_8(monkeypatch):
    """If stdout accepts such bytes, the name can be pasted."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", "surrogateescape"))
    say("λ \udcff")
    assert written.getvalue() == "λ ".encode() + b"\xff\n"


LONG = 300 * "n"


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        *(
            (each, [path], named)
            for each, name in ((status, "PATH"), (report, "PATH"), (probe, "MODEL"))
            for path, named in (
                (LONG, f"at most 255 bytes; {name} has one of 300"),
                ("", f"{name} must name a file or a folder; got ''"),
            )
        ),
        *(
            (each, ["a", "-o", path], named)
            for each in (report, probe)
            for path, named in ((LONG, "--output has one of 300"), ("", "--output must name"))
        ),
        *(
            (probe, ["a", f"--{name}", LONG], f"--{name} has one of 300")
            for name in ("text", "tokenizer")
        ),
    ],
)
def test_a_path_that_cannot_exist_is_refused(
    tmp_path, monkeypatch, capsys, command, arguments, expected
):
    """An empty one, as from a variable that is not set, does not stand for the current folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    RunRecord.create("run", {})
    monkeypatch.setattr(sys, "argv", ["nerve", *arguments])
    with pytest.raises(SystemExit) as exit_:
        command.main()
    assert exit_.value.code == 1
    assert expected in capsys.readouterr().err
    assert [path.name for path in (*tmp_path.iterdir(), *Path().iterdir())] == ["here", "run"]


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_closed_stream_ends_no_command(tmp_path, closed):
    """No file gets its descriptor, and with it what is printed."""
    RunRecord.create(tmp_path / "run", {})
    code = "import sys; sys.argv[1:] = ['.']; from nerve.cli import entry; entry.status()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=None if closed == 1 else subprocess.PIPE,
        stderr=None if closed == 2 else subprocess.PIPE,
        preexec_fn=lambda: os.close(closed),
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert (done.returncode, done.stderr or b"") == (0, b"")
    assert closed == 1 or b"1 run: 1 " in done.stdout
