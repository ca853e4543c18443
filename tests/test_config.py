"""Values as they come from a configuration: what is a number, a count, a list."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from nerve.config import from_mapping, require_count, require_type
from nerve.errors import ConfigError


@pytest.mark.parametrize("value", [True, 1.0, "1", 0, -1, None, [1]])
def test_a_count_is_a_whole_number_that_is_large_enough(value):
    with pytest.raises(ConfigError, match=r"^n must be a whole number of at least 1; got"):
        require_count("n", value)


def test_a_count_may_start_elsewhere_or_be_null():
    require_count("n", 0, least=0)
    require_count("n", np.int64(3))
    require_count("n", None, or_null=True)
    with pytest.raises(
        ConfigError, match=r"^n must be null or a whole number of at least 2; got 1"
    ):
        require_count("n", 1, least=2, or_null=True)


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ([1], (list,)),
        ((1, 2), (list,)),
        (3, (float,)),
        (np.float64(0.5), (float,)),
        (True, (bool,)),
        ("a", (int, str)),
    ],
)
def test_values_of_a_kind(value, kinds):
    require_type("key", value, *kinds)


@pytest.mark.parametrize(
    ("value", "kinds", "named"),
    [
        ("abc", (list,), "a list"),
        (True, (int,), "a whole number"),
        (False, (float, type(None)), "a number or null"),
        (1, (bool,), "true or false"),
        (1.5, (int,), "a whole number"),
    ],
)
def test_a_text_is_no_list_and_true_is_no_number(value, kinds, named):
    with pytest.raises(ConfigError, match=f"^key must be {named}; got"):
        require_type("key", value, *kinds)


@dataclass(frozen=True)
class Group:
    steps: list = field(default_factory=list)
    rate: int | float = 0.5


def test_the_types_of_fields_are_those_of_values():
    assert from_mapping(Group, {"steps": (1, 2), "rate": 1}, "group").steps == (1, 2)
    with pytest.raises(ConfigError, match=r"^group\.steps must be a list; got 'all'"):
        from_mapping(Group, {"steps": "all"}, "group")
    with pytest.raises(ConfigError, match="a key of group must be one of rate, steps; got 'step'"):
        from_mapping(Group, {"step": []}, "group")
