"""The columns of a configuration: one for each of its leaves."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nerve.errors import ConfigError

CONFIGURED = "config."
"""Prefix of a configuration leaf that has the name of a recorded column."""

RECORDED_GROUPS = ("final", "fingerprints", "versions", "job", "pre_scales")
"""The fields of a record that are mappings, each entry of which is a column."""


def require_distinct(config: Mapping[Any, Any], recorded: Collection[str]) -> None:
    """Refuses a configuration in which a value would take the place of another one.

    Args:
        recorded: the fields of a record.

    Raises:
        ConfigError: names both keys, and what they would share.
    """
    places: dict[str, str] = {}
    for dotted, place, value in _leaves(config, "", "config"):
        names = {dotted}
        is_seed = dotted == "seed" and type(value) is int  # it is that of the record
        if not is_seed and _is_recorded(dotted, recorded):
            names = {dotted, CONFIGURED + dotted}  # the latter where the record has the former
        for name in names:
            other = places.setdefault(name, place)
            if other != place:
                raise _shared(other, place, f"are both the column {name}")


def _leaves(values: Mapping[Any, Any], prefix: str, place: str) -> Iterator[tuple[str, str, Any]]:
    """The dotted names of a configuration's leaves, where each of them is, and its value."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        inner = f"{place}[{key!r}]"
        other = keys.setdefault(str(key), key)
        if other != key:  # a mapping has no equal keys
            raise _shared(f"{place}[{other!r}]", inner, f"are both stored as {str(key)!r}")
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.", inner)
        else:
            _check_listed(value, inner)
            yield f"{prefix}{key}", inner, value


def _check_listed(value: object, place: str) -> None:
    """Refuses mappings in a list, which is one value, whose keys would have the same name."""
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if isinstance(item, Mapping):
                for _ in _leaves(item, "", f"{place}[{i}]"):
                    pass
            else:
                _check_listed(item, f"{place}[{i}]")


def _is_recorded(dotted: str, recorded: Collection[str]) -> bool:
    return dotted in recorded or dotted.startswith(tuple(f"{name}." for name in RECORDED_GROUPS))


def _shared(one: str, other: str, what: str) -> ConfigError:
    return ConfigError(
        f"Each value of a configuration has a name of its own; {one} and {other} {what}. Rename "
        "one of them."
    )
