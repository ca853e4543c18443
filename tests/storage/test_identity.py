"""config_id depends on what defines the result and on nothing else; run_id is unique."""

import json
import math
import random
import re
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support import composed

from nerve.cli.config.compose import identity, resolved
from nerve.storage import identity as identity_module
from nerve.storage.identity import (
    ADDED,
    EXCLUDED,
    completed,
    config_id,
    differences,
    ids_of_plain,
    new_run_id,
)
from nerve.storage.json_values import from_json, to_json

CONFIG = {
    "model": {"d_model": 128, "n_layers": 4, "dropout": 0.0},
    "optimizer": {"lr": 3e-3, "betas": [0.9, 0.95]},
    "data": {"batch_size": 16},
    "seed": 1,
}


def test_known_value():
    """Equal on every machine and in later versions: SHA-256 of {"ffn":{"width":4},"seed":1}."""
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
def test_excluded_keys_of_nerve_run_do_not_matter(default, key):
    """Neither as a value nor as a whole group."""
    for value in ("/somewhere", {"a": {"b": 1}}):
        config = changed(default, key, value)
        assert config_id(config) == config_id(changed(default, key)) == config_id(default)
        assert differences(default, config) == []


@pytest.mark.parametrize("key", [*EXCLUDED, "regularizer", "model.pre_std"])
def test_keys_of_a_users_configuration_count_whatever_they_are_called(default, key):
    """`objective` is one thing to nerve-run, and another in a user's loop."""
    for foreign in (CONFIG, changed(default, "normalization")):
        configs = [changed(foreign, key, each) for each in ("mlm", "clm", None, {"name": "none"})]
        configs.append(changed(foreign, key))
        both = [ids_of_plain(config) for config in configs]
        assert [len(set(ids)) for ids in zip(*both, strict=True)] == [5, 5]
        assert differences(*configs[:2]) == [key]


def test_what_a_watched_run_records_of_later_settings_counts_as_in_nerve_run():
    """Both record the settings of the monitor under the same names, so that both keep their ids."""
    before = {"objective": "mlm", "monitor": {"every_n_steps": 100, "source": "train"}}
    added = {
        key.removeprefix("monitor."): value
        for key, value in ADDED.items()
        if key.startswith("monitor.")
    }
    assert len(added) > 4
    now = {**before, "monitor": before["monitor"] | added}
    assert config_id(now) == config_id(before)
    assert differences(before, now) == []
    other = {**before, "monitor": before["monitor"] | added | {"skip_first": 1}}
    assert differences(before, other) == ["monitor.skip_first"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": True}, {"a": 1}),
        ({"a": "1"}, {"a": 1}),
        ({"a": None}, {"a": 0}),
        ({"a": None}, {}),
        ({"a": float("inf")}, {"a": "inf"}),
        ({"a": float("inf")}, {"a": float("-inf")}),
        ({"a": float("inf")}, {"a": None}),
        ({"_target_": "a.b.C"}, {"_target_": "a.b.D"}),
        ({"_target_": "a.b.C"}, {"target": "a.b.C"}),
        ({"target": "a.C"}, {"target": "b.C"}),
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
    assert differences(one, other)


@pytest.fixture(scope="module")
def default() -> dict:
    """The configuration of the default run, as in run.json."""
    config = composed("logger=none")
    values = resolved(config)
    assert config_id(values) == identity(config)
    return values


@pytest.fixture(scope="module")
def images() -> dict:
    """The configuration of a run on images."""
    return resolved(composed("logger=none", "model=mixer_tiny"))


def changed(config: dict, dotted: str, *value: object) -> dict:
    """`config` with `value` at the dotted key, or without the key if no value is given."""
    config = deepcopy(config)
    *parents, leaf = dotted.split(".")
    node = config
    for name in parents:
        node = node.setdefault(name, {})
    node.pop(leaf, None)
    if value:
        node[leaf] = value[0]
    return config


@pytest.mark.parametrize("key", ADDED)
def test_a_key_added_later_changes_an_id_only_with_a_value_that_changes_the_run(
    default, images, key
):
    """Earlier runs without the key keep their ids; the same key elsewhere counts."""
    default = images if key.startswith("data.images.") else default
    before, same = changed(default, key), changed(default, key, ADDED[key])
    assert config_id(before) == config_id(same) == config_id(default)
    assert differences(before, same) == []
    others = ("other", {"other": 1}, [ADDED[key]], 0 if ADDED[key] is None else None, True)
    for value in others:
        other = changed(default, key, value)
        assert config_id(other) != config_id(default)
        assert [name.removesuffix(".other") for name in differences(before, other)] == [key]
    elsewhere = {**before, "elsewhere": {key.rpartition(".")[2]: ADDED[key]}}
    assert config_id(elsewhere) != config_id(default)


@pytest.mark.parametrize("key", ADDED)
def test_a_configuration_from_before_a_key_gets_what_that_key_means_for_it(images, key):
    text = resolved(composed("logger=none", "data=text_files", "data.corpus.paths=[a.txt]"))
    config = images if key.startswith("data.images.") else text
    before = changed(config, key)
    as_written = deepcopy(before)
    assert completed(before) == changed(config, key, ADDED[key])
    assert before == as_written
    for same in (config, changed(config, key, "mine")):
        assert completed(same) == same


def test_what_is_added_is_no_part_of_what_is_added_to_others(default):
    config = completed(changed(default, "monitor.groups"))
    config["monitor"]["groups"].append("position")
    assert ADDED["monitor.groups"] == []


@pytest.mark.parametrize("data", ["python_source", "digits", "glyphs"])
def test_what_concerns_other_data_is_not_added(data):
    model = ["model.patch_size=4"] if data == "glyphs" else []
    images = [] if data == "python_source" else ["model=mixer_tiny", *model]
    config = resolved(composed("logger=none", *images, f"data={data}"))
    assert completed(config) == config


def test_a_configuration_that_is_not_of_nerve_run_gets_no_keys(default):
    for group in ("model", "normalization", "activation", "ffn", "optimizer", "data", "trainer"):
        foreign = changed(changed(default, group), "monitor.groups")
        assert completed(foreign) == foreign


def test_false_is_not_the_zero_that_means_as_before(monkeypatch, default):
    monkeypatch.setitem(ADDED, "a.b", 0)
    monkeypatch.setitem(ADDED, "c", {"d": [1]})
    before = config_id({**default, "a": {}})
    assert config_id({**default, "a": {"b": 0.0}, "c": {"d": [1.0]}}) == before
    assert config_id({**default, "a": {"b": False}}) != before
    assert config_id({**default, "a": {}, "c": {"d": [1], "e": 2}}) != before


def test_of_a_target_the_last_name_counts():
    """In any module, so that a class can move; nothing else is ignored with it."""

    def config(module: str) -> dict:
        inner = {"_target_": f"{module}.Inner", "x": 1}
        return {"_target_": f"{module}.Outer", "one": inner, "list": [{"deep": [inner]}]}

    assert config_id(config("nerve.data.text")) == config_id(config("elsewhere"))
    assert differences(config("nerve.data.text"), config("elsewhere")) == []
    other = config("nerve.data.text")
    other["list"][0]["deep"][0] = {"_target_": "nerve.data.text.Other", "x": 1}
    assert differences(config("nerve.data.text"), other) == ["list"]
    # As OmegaConf gives what has no value yet, and a call whose target is itself configured.
    assert config_id({"_target_": None}) != config_id({"_target_": {"a": 1}})


def test_what_json_does_not_have_comes_back_from_it():
    """NaN and infinities in a configuration, also in lists; NumPy numbers and paths become plain
    values."""
    config = {
        "a": math.inf,
        "b": [1, {"c": -math.inf}, (math.nan, np.float64("inf"))],
        "d": np.float32(0.5),
        "e": Path("/a"),
        "f": {"float": 1.5},
        "g": {"float": [1]},
    }
    text = json.dumps(to_json(config), allow_nan=False)
    again = from_json(json.loads(text))
    assert again["a"] == again["b"][2][1] == math.inf
    assert again["b"][1] == {"c": -math.inf}
    assert math.isnan(again["b"][2][0])
    assert (again["d"], again["e"]) == (0.5, "/a")
    assert (again["f"], again["g"]) == ({"float": 1.5}, {"float": [1]})
    assert config_id(again) == config_id(config) == config_id(json.loads(text))
    assert differences(config, again) == []
    assert differences({"a": math.inf}, {"a": 1.0}) == ["a"]


class Plain:
    """Without a text of its own: Python gives the address."""


def test_objects_and_sets_are_the_same_text_in_every_process():
    """Else a run could not be resumed: neither addresses nor the order of hashes is kept."""

    def schedule():
        pass

    def config():
        return {
            "function": schedule,
            "bound": partial(schedule, 1),
            "object": Plain(),
            "set": {f"layer {i}" for i in range(40)},
            "mixed": frozenset({3, "a", None, (1, 2)}),
        }

    first, second = to_json(config()), to_json(config())
    assert first == second
    assert "0x" not in json.dumps(first)
    assert first["set"] == sorted(config()["set"])
    assert first["mixed"] == ["a", 3, [1, 2], None]
    assert "schedule" in first["function"]
    assert "schedule" in first["bound"]
    assert "Plain" in first["object"]


def test_what_can_be_read_only_once_is_not_read():
    """Else the caller would miss it, and the second time its text would be another one."""
    numbers = iter([1, 2])
    assert to_json({"a": numbers}) == to_json({"a": numbers})
    assert [*numbers] == [1, 2]


def test_of_a_target_the_module_does_not_count_and_the_class_does():
    def named(target: str) -> str:
        return config_id({"model": {"_target_": target}})

    assert named("a.b.GPT") == named("c.GPT") == named("GPT")
    assert named("a.build_model") == named("b.c.build_model")
    assert named("a.GPT.from_preset") == named("b.GPT.from_preset")
    assert named("a.GPT.from_preset") != named("a.Mixer.from_preset")


def test_ids_are_short_hex():
    assert re.fullmatch(r"[0-9a-f]{12}", config_id(CONFIG))
    assert re.fullmatch(r"[0-9a-f]{16}", new_run_id())


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
        "data": {"batch_size": 16},
        "seed": 1,
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
    assert bool(differences(CONFIG, other)) == (config_id(CONFIG) != config_id(other))


@pytest.mark.parametrize(
    "config",
    [
        {"seed": 1, "ffn": {"width": 4}},
        {"ffn": {"width": 4.0}, 'ü "x': [1, True, {"seed": 2}], "none": None},
        {"limit": math.inf, "threads": 3, "data": {"cache_dir": "/tmp", "seed": 1}, "empty": {}},
    ],
)
def test_both_ids_of_a_configuration_are_those_of_its_canonical_json(config):
    """Whatever is cached of its groups; the second id is the first without the seed."""
    for _ in range(2):
        assert ids_of_plain(config)[0] == config_id(config)
        without = {key: value for key, value in config.items() if key != "seed"}
        assert ids_of_plain(config)[1] == config_id(without)


def test_what_is_remembered_tells_numbers_from_truth_and_text():
    ids = [ids_of_plain({"a": value})[0] for value in (1, 1.0, True, "1", None)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


def test_no_more_groups_are_remembered_than_a_limit(monkeypatch):
    monkeypatch.setattr(identity_module, "_MOST_KNOWN", 3)
    monkeypatch.setattr(identity_module, "_KNOWN", {})
    ids = [ids_of_plain({"a": i % 5}) for i in range(20)]
    assert ids[:5] == ids[5:10] == ids[15:]
    assert len(identity_module._KNOWN) <= 3
