"""The cached composition in tests equals that of Hydra."""

from copy import deepcopy
from unittest import mock

import composing
import pytest
from hydra import compose
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import Container, DictConfig, Node, OmegaConf
from omegaconf.base import Metadata
from support import composed, hydra_at_conf

COMMANDS = [
    ("config", []),
    ("config", ["activation=relu", "optimizer=muon", "optimizer.lr=0.1", "seed=3"]),
    ("config", ["model=mixer_tiny", "+trainer.barebones=true", "~logger", "ffn={width: 2}"]),
    ("config", ["hydra/launcher=slurm", "hydra.launcher.mem_gb=2", "activation@extra=silu"]),
    ("activation", ["scale=gpu", "activation=gelu"]),
    ("paper_optimizer", []),
]


@pytest.fixture
def by_hydra(monkeypatch):
    """Calls a function without the cache."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(OmegaConf, "load", staticmethod(composing.load))
            patch.setattr(
                config_loader_impl, "create_defaults_list", composing.create_defaults_list
            )
            patch.setattr(defaults_list, "_create_interpolation_map", composing.choices)
            name = "_compose_config_from_defaults_list"
            patch.setattr(ConfigLoaderImpl, name, composing.compose_defaults)
            patch.setattr(CachingConfigRepository, "__init__", composing.begin_caching)
            patch.setattr(OverridesParser, "parse_rule", composing.parse)
            patch.delattr(Metadata, "__deepcopy__")
            for kind, copy in composing.copies.items():
                patch.setattr(kind, "__deepcopy__", copy)
            return function()

    return call


@pytest.mark.parametrize(("name", "overrides"), COMMANDS, ids=lambda text: " ".join(text)[:40])
def test_it_is_the_same_however_often_it_was_composed(by_hydra, name, overrides):
    def text():
        try:
            config = composed(*overrides, name=name, with_hydra=True)
        except HydraException as error:
            return str(error)
        return OmegaConf.to_yaml(config)

    expected = by_hydra(text)
    assert [text(), text()] == [expected] * 2


def test_a_default_may_be_named_after_the_choice_of_another_one(by_hydra, tmp_path):
    (tmp_path / "optimizer" / "rate").mkdir(parents=True)
    (tmp_path / "optimizer" / "ours.yaml").write_text("defaults: [{rate: '${model}'}, _self_]")
    (tmp_path / "optimizer" / "rate" / "mixer_tiny.yaml").write_text("lr: 0.125")

    def rate():
        path = f"hydra.searchpath=[file://{tmp_path}]"
        return composed(path, "model=mixer_tiny", "optimizer=ours").optimizer.rate.lr

    assert [rate(), by_hydra(rate)] == [0.125, 0.125]


def test_what_was_composed_is_the_callers_own():
    first = composed()
    first.optimizer.lr = 7
    assert composed().optimizer.lr != 7


def all_nodes(node) -> list[Node]:
    """A node and all nodes in it."""
    content = node._content if isinstance(node, Container) else ()
    children = content.values() if isinstance(content, dict) else content or ()
    assert all(child._parent is node for child in children)
    return [node, *(each for child in children for each in all_nodes(child))]


def described(node) -> list[tuple]:
    """Whatever a copy of a node has in common with it, for all nodes in it."""
    return [
        (type(each), each._metadata, None if isinstance(each, Container) else each._value())
        for each in all_nodes(node)
    ]


def test_a_copy_of_a_configuration_is_that_of_the_standard_library(by_hydra):
    config: DictConfig = composed("hydra/launcher=slurm", with_hydra=True)
    expected = by_hydra(lambda: deepcopy(config))
    copied = deepcopy(config)
    assert described(copied) == described(expected)
    assert copied == expected == config
    assert len(all_nodes(copied)) > 200
    assert not set(map(id, all_nodes(copied))) & set(map(id, all_nodes(config)))
    OmegaConf.set_readonly(copied, True)
    assert OmegaConf.is_readonly(copied.optimizer)
    assert not OmegaConf.is_readonly(config.optimizer)


def test_a_copy_of_a_part_of_a_configuration_knows_the_whole(by_hydra):
    """To which its interpolations refer."""
    config = composed(with_hydra=True)
    for copied in (deepcopy(config.optimizer), by_hydra(lambda: deepcopy(config.optimizer))):
        assert copied._parent is config


def test_a_folder_of_a_test_is_read_each_time(tmp_path):
    option = tmp_path / "activation" / "ours.yaml"
    option.parent.mkdir()
    ours = (f"hydra.searchpath=[file://{tmp_path}]", "activation=ours")
    for name in ("gelu", "relu"):
        option.write_text(f"name: {name}\n")
        assert composed(*ours).activation.name == name


def test_a_search_path_is_that_of_one_composition(tmp_path):
    """Also where several are composed by one loader, as those of a sweep are."""
    option = tmp_path / "activation" / "ours.yaml"
    option.parent.mkdir()
    option.write_text("name: gelu\n")
    with hydra_at_conf():
        ours = compose("config", [f"hydra.searchpath=[file://{tmp_path}]", "activation=ours"])
        assert ours.activation.name == "gelu"
        with pytest.raises(HydraException, match="Could not find 'activation/ours'"):
            compose("config", ["activation=ours"])


def test_an_override_knows_the_loader_that_it_was_parsed_for():
    """Which lists the options of a sweep over all of a group."""
    loaders = [mock.Mock(), mock.Mock()]
    parsed = [OverridesParser.create(each).parse_overrides(["seed=1"])[0] for each in loaders]
    assert [each.config_loader for each in parsed] == loaders
