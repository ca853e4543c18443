"""Groups of which a run has one option, and lists that would merge several into one."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.types import RunMode

from nerve.cli.config.compose import CONF, SWEEPS
from nerve.errors import ConfigError

SEVERAL = ("logger",)
"""Groups of which a run may have several options."""


def refuse_lists(overrides: Iterable[Override]) -> None:
    """Refuses overrides that give a list to a group of which one option is meant.

    Raises:
        ConfigError: with what is written for a run of each.
    """
    for override in overrides:
        value = None if override.is_delete() else override.value()
        given = value.list if isinstance(value, ChoiceSweep) else [value]
        if override.key_or_group in _groups() and any(isinstance(each, list) for each in given):
            raise _merged(override.key_or_group, _flat(given))


def refuse_merged(loader: ConfigLoader, config_name: str | None, overrides: Sequence[str]) -> None:
    """Refuses a list of options in the defaults of the files that are composed.

    What an option of a group itself builds upon, in that group, is no such list.

    Raises:
        ConfigError: with what is written for a run of each.
    """
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    defaults = loader.compute_defaults_list(config_name, list(overrides), RunMode.RUN).defaults
    for each in defaults:
        group, _, option = (each.config_path or "").rpartition("/")
        parent = each.parent or ""
        if group in _groups() and parent.rpartition("/")[0] != group:
            found[parent, group].append(option)
    for (_, group), options in found.items():
        if len(options) > 1:
            raise _merged(group, options)


@cache
def _groups() -> frozenset[str]:
    """The groups that are shipped, without those that take several options."""
    groups = {
        path.parent.relative_to(root).as_posix()
        for root in (CONF, SWEEPS)
        for path in root.rglob("*/*.yaml")
    }
    return frozenset(groups.difference(SEVERAL))


def _flat(given: Iterable[Any]) -> list[str]:
    return [
        str(option) for each in given for option in (each if isinstance(each, list) else [each])
    ]


def _merged(group: str, options: Sequence[str]) -> ConfigError:
    names = ",".join(options)
    return ConfigError(
        f"{group} takes one option; got a list, [{names}], which would be merged into one run. For "
        f"a run of each write {group}={names} and -m, or {group}: {names} in hydra.sweeper.params."
    )
