"""Values of configurations and records as JSON, which has no NaN and no infinity."""

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Set
from typing import Any

NON_FINITE = {str(number): number for number in (math.inf, -math.inf, math.nan)}


_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
"""The address in the text of a function, or of an object whose class does not define its text."""


def to_json(
    value: Any, non_finite: Callable[[float], Any] = lambda number: {"float": str(number)}
) -> Any:
    """`value` as JSON can represent it; `from_json` is the inverse.

    NumPy and tensor scalars become numbers, and collections lists, sets in a fixed order. Paths and
    other objects become text, the same in every process: without the address of an object.

    Args:
        value: any value of a configuration or a record.
        non_finite: replaces NaN and infinities, which JSON does not have.
    """
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:  # the most frequent cases
        return value
    if kind is dict:
        return {str(key): to_json(item, non_finite) for key, item in value.items()}
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): to_json(item, non_finite) for key, item in value.items()}
    if isinstance(value, Set):
        return sorted((to_json(item, non_finite) for item in value), key=canonical_json)
    if isinstance(value, Collection) and not isinstance(value, str):
        return [to_json(item, non_finite) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else non_finite(value)
    return value if isinstance(value, bool | int | str) else _ADDRESS.sub("", str(value))


def from_json(value: Any) -> Any:
    """The inverse of `to_json`: `{"float": "inf"}` becomes infinity again."""
    if isinstance(value, dict):
        if is_non_finite(value):
            return NON_FINITE[value["float"]]
        return {key: from_json(item) for key, item in value.items()}
    return [from_json(item) for item in value] if isinstance(value, list) else value


def is_non_finite(value: Any) -> bool:
    """Whether `value` is how `to_json` represents NaN or an infinity."""
    if not isinstance(value, Mapping):
        return False
    name = value.get("float")
    return len(value) == 1 and isinstance(name, str) and name in NON_FINITE


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and without spaces, in which true and 1 are different."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
