"""Values of the command line that are taken as they are: paths and marks, whatever their signs."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from nerve.config import quoted, require, require_path

DIRECTORIES = ("resume", "hydra.run.dir", "hydra.sweep.dir", "data.cache_dir")
"""Keys of one path, of which no sweep makes several."""

TEXTS = (
    *("data.corpus.path", "data.corpus.paths", "data.corpus.roots", "data.images.path"),
    *("data.tokenizer", "data.corpus.separator", "data.separator_token"),
)
"""Keys of a path or a mark, which a sweep may vary and which may have a list."""

OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Those of which Hydra makes directories before anything else is looked at."""

_PATHS_OF_DATA = ("cache_dir", "tokenizer", "corpus.path", "images.path")
_LISTS_OF_PATHS = ("corpus.paths", "corpus.roots")

_UNREADABLE = object()


def with_literal_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with quotes around the values of `DIRECTORIES` and `TEXTS` that Hydra's
    grammar does not read as that text; `~` is the user's home in directories that Hydra makes.

    What it reads as a list, null or (of `TEXTS`) a choice for a sweep stays, unless a file has that
    very name.
    """
    return [_literal(argument) for argument in arguments]


def require_directories(overrides: Iterable[Override]) -> None:
    """Refuses what can be no directory of a run.

    Raises:
        ConfigError: for a value that is empty, null, no text, or has too long a name.
    """
    for override in overrides:
        key = override.key_or_group
        if override.is_delete() or key not in (*OF_HYDRA, "resume"):
            continue
        value = override.value()
        if isinstance(value, ChoiceSweep) or (key == "resume" and value is None):
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        require_path(key, str(value) if is_number else value)  # a directory may be called 5


def require_paths_of_data(data: Mapping[str, Any]) -> None:
    """Refuses what can be no path where one belongs; whether it is there is not looked at."""
    for name in (*_PATHS_OF_DATA, *_LISTS_OF_PATHS):
        node: Any = data
        *groups, leaf = name.split(".")
        for group in groups:
            node = node.get(group)
            node = node if isinstance(node, Mapping) else {}
        if node.get(leaf) is None and (name != "corpus.paths" or leaf not in node):
            continue
        value, key = node[leaf], f"data.{name}"
        if name in _LISTS_OF_PATHS and isinstance(value, list):
            require(bool(value), f"{key} must have a path; got an empty list.")
            for i, path in enumerate(value):
                require_path(f"{key}[{i}]", path)
        else:
            require_path(key, value)


def _literal(argument: str) -> str:
    given, is_override, value = argument.partition("=")
    key = given.lstrip("+")
    if not is_override or not value or key not in (*DIRECTORIES, *TEXTS):
        return argument
    read = _read(argument)
    is_choice = isinstance(read, ChoiceSweep) and key in TEXTS and not os.path.exists(value)
    if read is None or isinstance(read, list | dict) or is_choice:
        return argument
    text = read if isinstance(read, str) else value
    if key in DIRECTORIES:
        text = os.path.expanduser(text)
    return argument if text == read else f"{given}={quoted(text)}"


def _read(argument: str) -> Any:
    """The value that Hydra reads; `_UNREADABLE` for what is not of its grammar."""
    try:
        return OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return _UNREADABLE
