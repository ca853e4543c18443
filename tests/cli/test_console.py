"""Numbers as the commands print them."""

from nerve.cli.console import duration


def test_a_duration_has_its_two_largest_units():
    assert [duration(seconds) for seconds in (0.2, 42, 425, 12_000, 187_200)] == [
        *("0 s", "42 s", "7 min 5 s", "3 h 20 min", "2 d 4 h"),
    ]
