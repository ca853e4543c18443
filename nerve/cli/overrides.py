"""The overrides of a command line: which are read, and what is said of those that are not."""

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from nerve.cli.compose import CONF, SWEEPS
from nerve.values import require

OWN_CONFIG = ("--config-dir", "-cd", "--config-path", "-cp")
"""Options with which a user brings configuration files, which may read values of their own."""


def overrides_of(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments; what cannot be parsed is left for Hydra to refuse."""
    given = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    try:
        return list(OverridesParser.create().parse_overrides(given))
    except HydraException:
        return []


def check_added(arguments: Sequence[str]) -> None:
    """Refuses values that `+` would add where nothing reads them.

    Groups whose values are built into something refuse what is wrong themselves.

    Raises:
        ConfigError: for such a value, with the one that was likely meant.
    """
    added = [each for each in overrides_of(arguments) if each.is_add() or each.is_force_add()]
    if not added or any(argument.startswith(OWN_CONFIG) for argument in arguments):
        return
    known = _known_keys()
    roots = {key.split(".")[0] for key in known}
    for override in added:
        key = override.key_or_group
        root, _, rest = key.partition(".")
        if "/" in key or root == "hydra":
            continue
        read = root in roots and (
            root != "optimizer" or key in known or rest.startswith(("parts.", "schedule."))
        )
        require(read, f"+{key} adds a value that nothing reads.{_meant(key, known)}")


def told(error: Exception) -> str:
    """What an error of Hydra or OmegaConf says, for one who need not know either."""
    text = str(error)
    if found := re.match(r"Could not override '([^']+)'", text):
        key = found[1]
        return f"There is no value {key!r}.{_meant(key, _known_keys())}"
    if found := re.match(r"Multiple values for ([^.]+)\.", text):
        return f"{found[1]} has an option already; choose another with {found[1]}=…, without +."
    if found := re.match(r"Cannot find primary config '([^']+)'", text):
        names = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
        close = get_close_matches(found[1], names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return f"--config-name must be one of {', '.join(names)}; got {found[1]!r}.{hint}"
    cause = f"\n{error.__cause__}" if isinstance(error.__cause__, Exception) else ""
    return text.split("\nConfig search path:")[0].rstrip() + cause


def _meant(key: str, known: Sequence[str]) -> str:
    parent, _, leaf = key.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    if siblings:
        close = [f"{parent}.{name}".strip(".") for name in get_close_matches(leaf, siblings, n=1)]
    else:
        close = get_close_matches(key, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + " nerve-run --cfg job shows all."


def _known_keys() -> list[str]:
    """The values of all groups' options, and the groups themselves, by their full names."""
    keys: list[str] = []
    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix().replace("/", ".").strip(".")
        if group.split(".")[0] == "hydra":
            continue
        is_global = "@package _global_" in path.read_text(encoding="utf-8")
        prefix = "" if is_global or not group else f"{group}."
        keys += [group] if group else []
        keys += [f"{prefix}{key}" for key in _flat(_loaded(path)) if key != "defaults"]
    return sorted(set(keys))


def _loaded(path: Path) -> Mapping[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    return {str(k): v for k, v in values.items()} if isinstance(values, dict) else {}


def _flat(values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield key
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in _flat(value))
