"""Tables compared with those of rich, and how cells are folded."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from nerve.cli import text_table
from nerve.cli.text_table import say_table

NAMES, RIGHT = ("run", "state", "loss"), ("loss",)


def printed(monkeypatch, capsys, rows, width=120):
    monkeypatch.setattr(text_table, "console", lambda: Console(width=width))
    say_table(NAMES, RIGHT, rows)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "rows",
    [[["a", "done", "1.25"]], [["longer", "", "–"], ["x", "two\nlines", "3"]], [["語", "ü", ""]]],
)
def test_a_table_that_fits_equals_that_of_rich(monkeypatch, capsys, rows):
    table = Table()
    for name in NAMES:
        table.add_column(name, justify="right" if name in RIGHT else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    expected = io.StringIO()
    Console(file=expected, width=120, markup=False).print(table)
    found = printed(monkeypatch, capsys, rows)
    assert [line.rstrip() for line in found.splitlines()] == [
        line.rstrip() for line in expected.getvalue().splitlines()
    ]


def test_the_widest_column_is_folded_without_loss(monkeypatch, capsys):
    path = "outputs/" + "abcdefghij" * 12
    found = printed(monkeypatch, capsys, [[path, "done", "1.25"], ["語" * 40, "", ""]], width=60)
    lines = found.splitlines()
    assert max(len(line) for line in lines) <= 60
    cells = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert "".join(cells) == path + "語" * 40


def test_cells_are_folded_between_words(monkeypatch, capsys):
    run, state = "2026-11-27_16-28-32_5207c22cc0ba88fd", "activation=relu trainer.max_steps=60"
    lines = printed(monkeypatch, capsys, [[run, state, "1.25"]], width=50).splitlines()
    folded = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines[3:-1]]
    assert folded == [
        ["2026-11-27_", "activation=relu", "1.25"],
        ["16-28-32_", "trainer.max_steps=60", ""],
        ["5207c22cc0ba88fd", "", ""],
    ]
    assert max(map(len, lines)) <= 50
