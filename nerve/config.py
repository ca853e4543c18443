"""Plain configuration mappings to frozen dataclasses, with errors that name the key."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from nerve.errors import ConfigError

T = TypeVar("T")

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    NoneType: "null",
}
"""Types of values, as messages name them."""

_ABSTRACT: dict[type, type] = {int: Integral, float: Real, list: Sequence}


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value: object, options: Collection[str]) -> None:
    """Raises `ConfigError` with the list of good values unless `value` is one of `options`."""
    if value in options:
        return
    close = get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{key} must be one of {', '.join(options)}; got {value!r}.{hint}")


def require_type(key: str, value: object, *kinds: type) -> None:
    """Raises `ConfigError` unless `value` is of one of `kinds`. A whole number is a number, too;
    true is neither. Any sequence but a text is a list."""
    if any(_is_of(value, kind) for kind in kinds):
        return
    named = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
    raise ConfigError(f"{key} must be {named}; got {value!r}.")


def require_count(key: str, value: object, *, least: int = 1, or_null: bool = False) -> None:
    """Raises `ConfigError` unless `value` is a whole number of at least `least`."""
    is_count = _is_of(value, int) and value >= least  # type: ignore[operator]
    named = "a positive whole number" if least == 1 else f"a whole number of at least {least}"
    require(
        is_count or (or_null and value is None),
        f"{key} must be {'null or ' if or_null else ''}{named}; got {value!r}.",
    )


def from_mapping(cls: type[T], values: Mapping[str, Any], group: str) -> T:
    """Builds the dataclass `cls` from `values`; an unknown or missing key and a value of another
    type than the field's are named with their group.

    Args:
        cls: a dataclass that validates the values of its own fields in `__post_init__`.
        values: the group's values; values may be dataclasses already.
        group: the configuration group, for messages (`"ffn"` gives `ffn.width`).

    Raises:
        ConfigError: for a key that `cls` does not have, one that it requires and is not there, or a
            value that is not of the field's type.
    """
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        require_choice(f"a key of {group}", key, sorted(known))
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in needed if name not in values]
    require(not missing, f"{group} lacks {', '.join(missing)}; got {', '.join(sorted(values))}.")
    hints = get_type_hints(cls)
    for key, value in values.items():
        require_type(f"{group}.{key}", value, *(get_args(hints[key]) or [hints[key]]))
    return cls(**values)


def _is_of(value: object, kind: type) -> bool:
    if isinstance(value, bool | str):  # to Python true is a whole number, and a text a sequence
        return isinstance(value, kind) and kind is not int
    return isinstance(value, _ABSTRACT.get(kind, kind))
