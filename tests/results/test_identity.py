"""config_id: what defines the result and nothing else; run_id: unique."""

import random

import pytest

from nerve.results import config_id, new_run_id
from nerve.results.identity import EXCLUDED, differences

CONFIG = {
    "model": {"d_model": 128, "n_layers": 4, "dropout": 0.0},
    "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95]},
    "data": {"batch_size": 16},
    "seed": 1,
}


def test_known_value():
    """The same on every machine and in later versions: SHA-256 of {"ffn":{"width":4},"seed":1}."""
    assert config_id({"seed": 1, "ffn": {"width": 4.0}}) == "4c269520c577"


def test_key_order_and_number_spelling_do_not_matter():
    reordered = {
        "seed": 1.0,
        "data": {"batch_size": 16},
        "optimizer": {"betas": (0.9, 0.95), "lr": 0.003},
        "model": {"dropout": 0, "n_layers": 4.0, "d_model": 128},
    }
    assert config_id(reordered) == config_id(CONFIG)


@pytest.mark.parametrize("key", EXCLUDED)
def test_excluded_keys_do_not_matter(key):
    """Neither as a value nor as a whole group."""
    for value in ("/somewhere", {"a": {"b": 1}}):
        config: dict = {**CONFIG, "data": dict(CONFIG["data"])}
        node, *path = config, *key.split(".")
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
        without = config_id({**CONFIG, **({"trainer": {}} if key.startswith("trainer") else {})})
        assert config_id(config) == without


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": True}, {"a": 1}),
        ({"a": "1"}, {"a": 1}),
        ({"a": None}, {"a": 0}),
        ({"a": None}, {}),
        ({"a": float("inf")}, {"a": "inf"}),
        ({"a": [1, 2]}, {"a": [2, 1]}),
        ({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}}),
        ({"a": {"threads": 1}}, {"a": {"threads": 2}}),
        ({"a": 0.1 + 0.2}, {"a": 0.3}),
        # Keys that mean nothing to nerve-run.
        ({"launcher": "a"}, {"launcher": "b"}),
        ({"sweep": "a"}, {"sweep": "b"}),
        ({"progress": 0.1}, {"progress": 0.2}),
        ({"data": {"num_workers": 1}}, {"data": {"num_workers": 2}}),
    ],
)
def test_what_can_change_the_result_changes_the_id(one, other):
    assert config_id(one) != config_id(other)


def test_ids_are_short_hex():
    assert len(config_id(CONFIG)) == 12
    assert int(config_id(CONFIG), 16) >= 0
    assert len(new_run_id()) == 8


def test_run_ids_do_not_follow_a_seed():
    """Two runs with the same seed are two runs."""
    random.seed(0)
    first = {new_run_id() for _ in range(100)}
    random.seed(0)
    assert len(first | {new_run_id() for _ in range(100)}) == 200


def test_differences_are_the_keys_that_make_another_result():
    other = {
        "model": {"d_model": 64, "n_layers": 4.0},
        "optimizer": {"lr": 3e-3, "betas": [0.9, 0.99]},
        "data": {"batch_size": 16, "cache_dir": "/somewhere"},
        "seed": 1,
        "threads": 2,
        "note": {"a": {"b": 1}},
        "empty": {},
    }
    assert differences(CONFIG, other) == [
        "empty",
        "model.d_model",
        "model.dropout",
        "note.a.b",
        "optimizer.betas",
    ]
    assert differences(CONFIG, {**CONFIG, "retry": True, "checkpoint": {"every_n_steps": 1}}) == []
    assert bool(differences(CONFIG, other)) == (config_id(CONFIG) != config_id(other))
