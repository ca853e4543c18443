"""Caches Hydra's composition of the shipped configuration for each choice of options.

A third of the tests compose a configuration, some of them dozens of times. Composing takes a tenth
of a second, because it parses thirty files, finds those that apply and merges them. Hydra still
applies overrides of values each time. Folders that a test creates are read each time.

Hydra also copies all structured configuration that is registered for each composition, which took a
tenth of the tests of the command, and parses each override anew. And copying a configuration takes
as long for what its nodes are as for what they hold.
"""

import copy
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import hydra
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import (
    AnyNode,
    BooleanNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    Node,
    OmegaConf,
    StringNode,
)
from omegaconf.base import Metadata

from nerve.cli.config.compose import CONF, SWEEPS

SHIPPED = (CONF, SWEEPS, Path(hydra.__file__).parent)
"""Folders of configuration that no test changes."""
PLACES = {"", "hydra.conf", *map(str, SHIPPED)}
"""What sources of configuration call them; structured configuration has no place."""

COPIED = (DictConfig, ListConfig, AnyNode, StringNode, IntegerNode, FloatNode, BooleanNode)
"""The nodes that a configuration has."""

load = OmegaConf.load
compose_defaults = ConfigLoaderImpl._compose_config_from_defaults_list
choices = defaults_list._create_interpolation_map
begin_caching = CachingConfigRepository.__init__
parse = OverridesParser.parse_rule
copies = {kind: kind.__deepcopy__ for kind in COPIED}

_defaults: dict[Any, DefaultsList] = {}
_composed: dict[Any, DictConfig] = {}


def remember() -> None:
    """Makes Hydra compose only once for each choice of options from now on."""
    OmegaConf.load = staticmethod(load_once)
    config_loader_impl.create_defaults_list = defaults_once
    defaults_list._create_interpolation_map = choices_where_needed
    ConfigLoaderImpl._compose_config_from_defaults_list = compose_once
    CachingConfigRepository.__init__ = begin_caching_in_place
    OverridesParser.parse_rule = parse_once
    Metadata.__deepcopy__ = copy_metadata
    for kind in COPIED:
        kind.__deepcopy__ = copy_node


_parsed = functools.cache(load)


def load_once(file: str | Path | IO[Any]) -> Any:
    """A cached `OmegaConf.load`."""
    path = Path(getattr(file, "name", file))
    if any(folder in path.parents for folder in SHIPPED):
        return copy.deepcopy(_parsed(str(path)))
    return load(file)


def _places(name: str | None, repo: IConfigRepository) -> tuple[str, ...] | None:
    """Where the configuration of this name comes from, unless part of it belongs to a test: a
    folder or, when a run is resumed, what the command itself put into Hydra's store."""
    places = tuple(source.path for source in repo.get_sources())
    is_shipped = any((folder / f"{name}.yaml").is_file() for folder in (CONF, SWEEPS))
    return places if is_shipped and PLACES.issuperset(places) else None


def defaults_once(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    """A cached `create_defaults_list`, which determines the files of a configuration."""
    how = (prepend_hydra, skip_missing)
    places = _places(config_name, repo)
    if places is None:
        return create_defaults_list(repo, config_name, overrides_list, *how)
    given = [each for each in overrides_list if not each.is_sweep_override()]
    options = [each for each in given if _is_option(each, repo)]
    key = (config_name, *how, places, tuple(each.input_line for each in options))
    if key not in _defaults:
        _defaults[key] = create_defaults_list(repo, config_name, options, *how)
    return replace(_defaults[key], config_overrides=[each for each in given if each not in options])


def choices_where_needed(
    overrides: Overrides, defaults: list[InputDefault], self_added: bool
) -> DictConfig:
    """`_create_interpolation_map`, but only if the name of a default depends on the choice of
    another; otherwise it is not needed, and Hydra would create it for each file."""
    if any(each.is_interpolation() for each in defaults):
        return choices(overrides, defaults, self_added)
    return DictConfig({})


def _is_option(override: Override, repo: IConfigRepository) -> bool:
    return repo.group_exists(override.key_or_group) and not isinstance(override.value(), dict)


def compose_once(
    self: ConfigLoaderImpl, defaults: Sequence[ResultDefault], repo: IConfigRepository
) -> DictConfig:
    """A cached `ConfigLoaderImpl._compose_config_from_defaults_list`, which merges these files."""
    places = _places(next(each.config_path for each in defaults if each.primary), repo)
    if places is None:
        return compose_defaults(self, list(defaults), repo)
    key = (places, tuple(map(repr, defaults)))
    if key not in _composed:
        _composed[key] = compose_defaults(self, list(defaults), repo)
    return copy.deepcopy(_composed[key])


def begin_caching_in_place(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
    """`CachingConfigRepository.__init__`, which copies a repository because it may get other
    sources; the sources themselves, and what is registered, stay as they are."""
    self.delegate = copy.copy(delegate)
    self.cache = {}


def parse_once(self: OverridesParser, text: str, rule_name: str) -> Any:
    """A cached `OverridesParser.parse_rule`, which calls no function of a sweep but names it."""
    return copy.deepcopy(_parsed_rule(text, rule_name))


@functools.cache
def _parsed_rule(text: str, rule_name: str) -> Any:
    return parse(OverridesParser.create(), text, rule_name)


def copy_metadata(self: Metadata, memo: dict[int, Any]) -> Metadata:
    """`copy.deepcopy`, without a look into types, which it keeps as they are."""
    copied = object.__new__(type(self))
    flags = None if self.flags is None else self.flags.copy()
    resolved = (
        copy.deepcopy(self.resolver_cache, memo) if self.resolver_cache else defaultdict(dict)
    )
    copied.__dict__ |= self.__dict__ | {"flags": flags, "resolver_cache": resolved}
    return copied


def copy_node(self: Node, memo: dict[int, Any]) -> Node:
    """`copy.deepcopy`, without the checks of a new node that has no value yet."""
    copied = object.__new__(type(self))
    own = copied.__dict__
    own |= self.__dict__
    own["_metadata"] = copy_metadata(own["_metadata"], memo)
    own["_flags_cache"] = None  # it is looked for again
    content = own.get("_content")
    if isinstance(content, dict):
        own["_content"] = {key: _copy_child(each, copied, memo) for key, each in content.items()}
    elif isinstance(content, list):
        own["_content"] = [_copy_child(each, copied, memo) for each in content]
    return copied


def _copy_child(node: Node, parent: Node, memo: dict[int, Any]) -> Node:
    copied: Node = type(node).__deepcopy__(node, memo)
    copied.__dict__["_parent"] = parent
    return copied
