"""What messages quote of other errors."""

import pytest

from nerve.errors import first_line


@pytest.mark.parametrize(
    ("error", "quoted"),
    [
        (
            RuntimeError("Connection reset.\nException raised from read (first frame)"),
            "Connection reset",
        ),
        (MemoryError(), "MemoryError"),
        (ValueError("\n  a path\n"), "a path"),
    ],
)
def test_one_line_of_an_error_is_quoted_even_if_it_has_no_message(error, quoted):
    assert first_line(error) == quoted
