"""Each value of a configuration has a column of its own, or is refused with the other one."""

import pytest

from nerve.errors import ConfigError
from nerve.storage.directory import RunDirectory
from nerve.storage.record import RunRecord, require_columns

SHARED = [
    ({"config": {"device": 1}, "device": 2}, "config['config']['device']", "config['device']"),
    ({"device": 2, "config.device": 1}, "config['device']", "config['config.device']"),
    ({"final": {"x": 1}, "config": {"final": {"x": 2}}}, "config['final']['x']", "['config']"),
    ({"seed": "a", "config": {"seed": "b"}}, "config['seed']", "config['config']['seed']"),
    ({"a.b": 1, "a": {"b": 2}}, "config['a.b']", "config['a']['b']"),
    ({"a": {"b": {"c": 1}, "b.c": 2}}, "config['a']['b']['c']", "config['a']['b.c']"),
    ({"": {"": 1}, ".": 2}, "config['']['']", "config['.']"),
    ({"a": {1: "x", "1": "y"}}, "config['a'][1]", "config['a']['1']"),
    ({"a": {None: "x", "None": "y"}}, "config['a'][None]", "config['a']['None']"),
    ({"a": [0, {True: "x", "True": "y"}]}, "config['a'][1][True]", "config['a'][1]['True']"),
]


@pytest.mark.parametrize(("config", "one", "other"), SHARED)
def test_two_values_with_one_name_are_refused_with_both_keys(tmp_path, config, one, other):
    with pytest.raises(ConfigError, match="has a name of its own") as refused:
        RunRecord.create(tmp_path / "run", config)
    assert one in str(refused.value)
    assert other in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_run_that_an_earlier_version_stored_with_them_is_resumed(tmp_path, monkeypatch):
    config = {"a.b": 1, "a": {"b": 2}}
    with monkeypatch.context() as patch:
        patch.setattr("nerve.storage.record.require_columns", lambda _: None)
        RunRecord.create(tmp_path, config).finish("interrupted")
    with RunDirectory(tmp_path).locked():
        assert RunDirectory(tmp_path).create_or_resume(config).restarts == 1


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"device": 2, "config": {"other": 1}},
        {"seed": 1, "config": {"seed": 2}},
        {"lr": 1, "config": {"lr": 2}, "config.config.lr": 3},
        {"a": {}, "a.b": 1, "b": {"a": 2}},
        {"labels": {0: "x", 1: "y", "2": "z"}},
        {"list": [{"a": 1}, {"a": 2}], "a": 3},
    ],
)
def test_values_with_names_of_their_own_are_taken(config):
    require_columns(config)
