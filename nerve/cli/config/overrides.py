"""The overrides of a command line: reading them, and refusing some before composition."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from hydra.conf import ConfigSourceInfo, HydraConf
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode

from nerve.cli.config.compose import CONF, SWEEPS
from nerve.cli.config.explain import known_keys, meant
from nerve.config import quoted, require, require_path
from nerve.errors import ConfigError

DIRECTORIES = ("resume", "hydra.run.dir", "hydra.sweep.dir", "data.cache_dir")
"""Keys that take one path, which a sweep cannot vary."""

TEXTS = (
    *("data.corpus.path", "data.corpus.paths", "data.corpus.roots", "data.images.path"),
    *("data.tokenizer", "data.corpus.separator", "data.separator_token"),
)
"""Keys that take a path or a mark; a sweep may vary them, and they may hold a list."""

OF_HYDRA = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Keys from which Hydra creates directories before anything else is checked."""

SEVERAL = ("logger",)
"""Groups that may have several options in one run."""

_OWN_FILES = ("--config-d", "-cd", "--config-p", "-cp", "hydra.searchpath=")
"""Prefixes of arguments that bring the user's own configuration files."""

_SET_BY_THE_RUN = {
    "trainer.callbacks": "callbacks.<name> adds one",
    "trainer.check_val_every_n_epoch": "monitor.every_n_steps determines when to validate",
    "trainer.default_root_dir": "hydra.run.dir sets the directory",
    "trainer.enable_model_summary": "the run turns it off",
    "trainer.logger": "the group logger sets the loggers",
    "trainer.max_epochs": "trainer.max_steps sets the end of training",
    "trainer.num_sanity_val_steps": "the validation at step 0 replaces it",
    "trainer.plugins": "the run sets them, for its checkpoints",
    "trainer.use_distributed_sampler": "the data module distributes the samples itself",
    "trainer.val_check_interval": "monitor.every_n_steps determines when to validate",
}
"""Values that `build_trainer` and the monitor set themselves, and what replaces them."""

_UNREADABLE = object()


def with_literal_paths(arguments: Sequence[str]) -> list[str]:
    """The arguments, with quotes around values of `DIRECTORIES` and `TEXTS` that Hydra's grammar
    would not read as the same text; `~` is expanded in directories that Hydra creates.

    Values that it reads as a list, null or (in `TEXTS`) a choice for a sweep are kept, unless a
    file has exactly that name.
    """
    return [_literal(argument) for argument in arguments]


def overrides_of(arguments: Sequence[str]) -> list[Override]:
    """The overrides among the arguments; Hydra refuses what cannot be parsed."""
    given = [argument for argument in arguments if "=" in argument and argument[0] != "-"]
    try:
        return list(OverridesParser.create().parse_overrides(given))
    except HydraException:
        return []


def value_of(overrides: Iterable[Override], key: str) -> Any:
    """The value given to `key`, the last if there are several; None if there is none."""
    given = [override.value() for override in overrides if override.key_or_group == key]
    return given[-1] if given else None


def require_directories(overrides: Iterable[Override]) -> None:
    """Refuses values that cannot be the directory of a run.

    Raises:
        ConfigError: for a value that is empty, null, not a string, or too long a name.
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


def check_added(overrides: Iterable[Override], arguments: Sequence[str]) -> None:
    """Refuses values added with `+` that nothing reads or that the run sets itself.

    Only clear cases: values that another value or a user's own file may refer to are allowed, and
    so are those that some option of `optimizer` has. Groups from whose values something is built
    refuse wrong keys themselves.

    Args:
        overrides: among the arguments.
        arguments: of the command line.

    Raises:
        ConfigError: for such a value, suggesting the one that was likely meant.
    """
    added = [each for each in overrides if each.is_add() or each.is_force_add()]
    for override in added:
        value = ".".join(override.key_or_group.split(".")[:2])
        require(
            value not in _SET_BY_THE_RUN,
            f"A run sets some values of trainer itself; +{override.key_or_group} would be ignored: "
            f"{_SET_BY_THE_RUN.get(value)}. Leave it out.",
        )
    if not added or has_own_files(arguments) or any("${" in argument for argument in arguments):
        return
    known = known_keys()
    roots = {key.split(".")[0] for key in known} | {path.name for path in SWEEPS.iterdir()}
    for override in added:
        key = override.key_or_group
        root, _, rest = key.partition(".")
        if "/" in key or root == "hydra":
            continue
        read = root in roots and (
            root != "optimizer" or key in known or rest.startswith(("parts.", "schedule."))
        )
        require(read, f"+{key} adds a value that nothing reads.{meant(key, known)}")


def has_own_files(arguments: Sequence[str]) -> bool:
    """Whether a command line names configuration files other than the shipped ones."""
    return any(argument.startswith(_OWN_FILES) for argument in arguments)


def refuse_lists(overrides: Iterable[Override]) -> None:
    """Refuses overrides that give a list to a group that takes one option, and values that cannot
    be the name of an option.

    Raises:
        ConfigError: with the syntax for running each of them.
    """
    for override in overrides:
        require(
            override.key_or_group != "",
            f"An argument must be key=value; got {override.input_line!r}, which has no key.",
        )
        value = None if override.is_delete() else override.value()
        given = value.list if isinstance(value, ChoiceSweep) else [value]
        if override.key_or_group in _groups() and any(isinstance(each, list) for each in given):
            raise _merged(override.key_or_group, _flat(given))
        is_group = override.key_or_group in (*_groups(), *SEVERAL)
        if is_group and not override.is_delete() and any(map(_is_no_name, given)):
            raise ConfigError(
                f"{override.key_or_group} takes the name of an option; got "
                f"{override.input_line}. Leave it out for the default, or name one that "
                "nerve-run --help lists."
            )


def refuse_merged(loader: ConfigLoader, hydra: HydraConf, overrides: Sequence[str]) -> None:
    """Refuses a list of options in the defaults of the composed files.

    An option that builds on another option of its own group is not such a list. Shipped files have
    none; where no others can be read, their defaults are not computed, which takes half as long as
    a composition.

    Args:
        loader: Hydra's.
        hydra: Hydra's own node of the composed configuration.
        overrides: of the command line, without those of Hydra's own node.

    Raises:
        ConfigError: with the syntax for running each of them.
    """
    if all(_is_shipped(source) for source in hydra.runtime.config_sources):
        return
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    given = [*hydra.overrides.hydra, *overrides]  # with hydra.searchpath, where options may be
    defaults = loader.compute_defaults_list(hydra.job.config_name, given, RunMode.RUN).defaults
    for each in defaults:
        group, _, option = (each.config_path or "").rpartition("/")
        parent = each.parent or ""
        if group in _groups() and parent.rpartition("/")[0] != group:
            found[parent, group].append(option)
    for (_, group), options in found.items():
        if len(options) > 1:
            raise _merged(group, options)


def _is_shipped(source: ConfigSourceInfo) -> bool:
    """Whether its files come with nerve or Hydra; what Python code stores has no file."""
    return source.path in (str(CONF), str(SWEEPS), "hydra.conf") or source.schema == "structured"


def _is_no_name(value: object) -> bool:
    if isinstance(value, list):
        return any(isinstance(each, list) or _is_no_name(each) for each in value)
    return value is None or isinstance(value, int | float)


@cache
def _groups() -> frozenset[str]:
    """The shipped groups, without those that take several options."""
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
        f"{group} takes one option; got a list, [{names}], which would be merged into one run. To "
        f"run each of them, use -m {group}={names}, or {group}: {names} in hydra.sweeper.params."
    )


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
    """The value as Hydra reads it; `_UNREADABLE` if its grammar does not accept it."""
    try:
        return OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return _UNREADABLE
