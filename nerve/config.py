"""Converts configuration mappings to frozen dataclasses, with errors that name the key."""

import os
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_args, get_type_hints

from nerve.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
K = TypeVar("K")

KINDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    NoneType: "null",
}
"""The names of types in messages."""

LONGEST_NAME = 255
"""The most bytes in a file name on all relevant file systems (NAME_MAX)."""

_ABSTRACT: dict[type, type] = {int: Integral, float: Real, list: Sequence}

_NOT_TEXT = ("null", "true", "false", "inf", "nan")
"""Words that Hydra reads as values other than strings."""


def quoted(text: str) -> str:
    """`text` as a value of an override, whatever characters it contains.

    For Hydra, a backslash is special only before a quote or at the end.
    """
    if re.fullmatch(r"[A-Za-z_./][A-Za-z0-9_./-]*", text) and text.lower() not in _NOT_TEXT:
        return text
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + (m[2] and "\\'"), text)
    return f"'{escaped}'"


def unquoted(value: str) -> str:
    """The inverse of `quoted`."""
    if not value.startswith("'"):
        return value
    return re.sub(r"(\\+)('|\Z)", lambda m: len(m[1]) // 2 * "\\" + m[2], value[1:-1])


def pasted(key: str, value: object) -> str:
    """An override that can be pasted into a shell: `key=value`, quoted if necessary."""
    text = f"{key}={quoted(str(value))}"
    is_safe_within = not re.search(r'["$`!\\\n]', text)
    return f'"{text}"' if "'" in text and is_safe_within else shlex.quote(text)


def require(condition: bool, message: str) -> None:
    """Raises `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_group(key: str, value: object, names: Collection[str] = ()) -> None:
    """Raises `ConfigError` unless `value` is a group of values that has all of `names`."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{key} must be a group of values; got {value!r}. Set single values, as in {key}.…=…, "
            "or choose another option of the group."
        )
    for name in names:
        if name not in value:
            raise ConfigError(
                f"{key} lacks {name}; got {', '.join(map(str, value)) or 'no values'}. Set "
                f"+{key}.{name}=…, or leave ~{key}.{name} out."
            )


def require_choice(key: str, value: object, options: Collection[str]) -> None:
    """Raises `ConfigError` with the list of valid values unless `value` is one of `options`."""
    if isinstance(value, str) and value in options:  # a list is not hashable
        return
    close = get_close_matches(str(value), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{key} must be one of {', '.join(options)}; got {value!r}.{hint}")


def require_several(key: str, values: Collection[object], options: Collection[str]) -> None:
    """Raises `ConfigError` unless `values` are a list of distinct members of `options`."""
    require_type(key, values, list)
    for each in values:
        require_choice(f"an entry of {key}", each, options)
    require(len({*values}) == len(values), f"{key} must not repeat an entry; got {list(values)!r}.")


def require_type(key: str, value: object, *kinds: type) -> None:
    """Raises `ConfigError` unless `value` is of one of `kinds`. A whole number is also a number;
    true is neither. Any sequence except a string is a list."""
    if any(_is_of(value, kind) for kind in kinds):
        return
    named = " or ".join(KINDS.get(kind, kind.__name__) for kind in kinds)
    raise ConfigError(f"{key} must be {named}; got {value!r}.")


def require_path(key: str, value: object) -> None:
    """Raises `ConfigError` unless `value` is a path that can exist on a file system."""
    require_type(key, value, str)
    path = str(value)
    require(path.strip() != "", f"{key} must name a file or a folder; got {path!r}.")
    longest = max(path.split("/"), key=lambda name: len(os.fsencode(name)))
    require(
        len(os.fsencode(longest)) <= LONGEST_NAME,
        f"The name of a file or folder may have at most {LONGEST_NAME} bytes; {key} has one of "
        f"{len(os.fsencode(longest))}, {longest[:20]!r}…",
    )


def require_count(key: str, value: object, *, least: int = 1, or_null: bool = False) -> None:
    """Raises `ConfigError` unless `value` is a whole number of at least `least`."""
    is_count = _is_of(value, int) and value >= least
    require(
        is_count or (or_null and value is None),
        f"{key} must be {'null or ' if or_null else ''}a whole number of at least {least}; got "
        f"{value!r}.",
    )


def require_steps(key: str, value: object, *, or_empty: bool = False) -> None:
    """Raises `ConfigError` unless `value` is a list of optimizer steps, or an empty one if that is
    allowed."""
    steps = value if _is_of(value, list) and (or_empty or value) else None
    require(
        steps is not None and all(_is_of(step, int) and step >= 0 for step in steps),
        f"{key} must be a list of optimizer steps, whole numbers from 0, as in [0,1,2,4,8]; got "
        f"{value!r}.",
    )


def require_reached(key: str, steps: Collection[int], last: int) -> None:
    """Raises `ConfigError` for steps that a run of `last` steps never reaches."""
    late = [step for step in steps if step > last]
    require(
        not late,
        f"{key} takes steps from 0 to trainer.max_steps; got {', '.join(map(str, late))} with "
        f"trainer.max_steps={last}. Omit these, or train for longer.",
    )


def require_layers(key: str, layers: Collection[object] | None, known: Collection[int]) -> None:
    """Raises `ConfigError` unless `layers` are among `known`, those with FFNs; None means all."""
    if layers is None or (len(layers) > 0 and all(each in known for each in layers)):
        return
    names = [str(each) for each in known]
    listed = names if len(names) <= 12 else [*names[:3], "…", names[-1]]
    raise ConfigError(
        f"{key} must be null (all) or layers that have FFNs, which are {', '.join(listed)}; got "
        f"{layers}."
    )


def require_left(key: str, skip_first: int, key_of_length: str, length: int) -> None:
    """Raises `ConfigError` unless sequences have positions beyond those that are excluded."""
    require(
        skip_first < length,
        f"{key} must leave positions to measure; got {key}={skip_first} of "
        f"{key_of_length}={length}.",
    )


def from_mapping(cls: type[T], values: Mapping[str, Any], group: str = "") -> T:
    """Builds the dataclass `cls` from `values`; errors name the key with its group.

    Args:
        cls: a dataclass that validates the values of its fields in `__post_init__`.
        values: the group's values, some of which may already be dataclasses.
        group: the configuration group, for messages (`"ffn"` gives `ffn.width`); empty for values
            that are arguments of a function.

    Raises:
        ConfigError: for values that are not a mapping, an unknown key, a missing required key, or a
            value that does not have the type of its field.
    """
    require_group(group, values)
    known = {f.name: f for f in fields(cls)}
    for key in values:
        require_choice(f"a key of {group}" if group else "an argument", key, sorted(known))
    needed = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    require_group(group, values, needed)
    hints = get_type_hints(cls)
    for key, value in values.items():
        name = f"{group}.{key}" if group else key
        require_type(name, value, *(get_args(hints[key]) or [hints[key]]))
    return cls(**values)


def _is_of(value: object, kind: type[K]) -> TypeGuard[K]:
    if isinstance(value, bool | str):  # in Python, true is an int and a string is a sequence
        return isinstance(value, kind) and kind is not int
    return isinstance(value, _ABSTRACT.get(kind, kind))
