"""Values are checked against the annotations of their parameters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional

import pytest

from nerve.cli.experiment.arguments import require_types
from nerve.errors import ConfigError


def takes(
    n: int = 1,
    name: str | None = None,
    path: str | Path = "a",
    listed: list[int] = [1],  # noqa: B006
    several: Sequence[str] = ("a",),
    either: str | Sequence[str] | None = None,
    older: Optional[int] = None,  # noqa: UP045
    table: dict[str, int] | None = None,
    word: Literal["a", "b"] = "a",
    free=None,
) -> None:
    """The parameters of a data module of the user."""


@pytest.mark.parametrize(
    "values",
    [
        {"n": 2, "name": None, "path": "b", "listed": [2], "several": ["b"]},
        {"either": "a"},
        {"either": ["a"]},
        {"either": None},
        {"older": None},
        {"table": {"a": 1}},
        {"word": "c", "free": object(), "unknown": 3},  # left to the target
    ],
)
def test_a_value_that_the_annotation_allows_is_accepted(values):
    require_types("data", takes, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": "x"}, "data.n must be a whole number; got 'x'"),
        ({"name": 3}, "data.name must be a string or null; got 3"),
        ({"path": [1]}, r"data.path must be a string; got \[1\]"),
        ({"listed": 1}, "data.listed must be a list; got 1"),
        ({"several": 1}, "data.several must be a list; got 1"),
        ({"either": 1}, "data.either must be a string or a list or null; got 1"),
        ({"older": "x"}, "data.older must be a whole number or null; got 'x'"),
    ],
)
def test_a_value_of_another_type_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        require_types("data", takes, values)
