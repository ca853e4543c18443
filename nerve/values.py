"""Plain configuration mappings to frozen dataclasses, with errors that name the key."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, TypeVar

from nerve.errors import ConfigError

T = TypeVar("T")


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


def from_mapping(cls: type[T], values: Mapping[str, Any], group: str) -> T:
    """Builds the dataclass `cls` from `values`; an unknown or missing key is named with its group.

    Args:
        cls: a dataclass that validates its own fields in `__post_init__`.
        values: the group's values; values may be dataclasses already.
        group: the configuration group, for messages (`"ffn"` gives `ffn.width`).

    Raises:
        ConfigError: for a key that `cls` does not have, or one that it requires and is not there.
    """
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        require_choice(f"a key of {group}", key, sorted(known))
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"{group} is incomplete: {error}; got {sorted(values)}.") from error
