"""What identifies a run of nerve.watch and of the callbacks, and which arguments are refused."""

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter
from pathlib import Path

import pytest
import torch
from by_hand import Net

import nerve
from nerve.errors import ConfigError, StoreError
from nerve.recording.settings import MonitorSettings

HELDOUT = [{"input_ids": torch.arange(64).reshape(2, 32) % 9}]


def watched(directory: Path, ask: Callable[[Net], dict] = lambda model: {}, **given) -> dict:
    """The configuration of a run of one step, measured on held-out batches before and after it.

    Args:
        ask: gives arguments that refer to the model.
        given: other arguments.
    """
    model = Net()
    with nerve.watch(model, directory, heldout=HELDOUT, **given, **ask(model)) as run:
        with torch.no_grad():
            model.embed.weight.mul_(0.5)
        run.step(0.5)
    return nerve.RunRecord.load(directory).config


def flags(path: Path) -> list[str]:
    return nerve.flag_runs(nerve.load_metrics(path), nerve.load_runs(path))["flag"].tolist()


def test_runs_that_differ_in_a_key_that_nerve_run_excludes_are_different_runs(tmp_path):
    """`objective` is where a sweep of nerve-run looks for its best value; a user may train with
    two objectives. Neither run repeats the other, and neither goes on in the other's directory."""
    for name in ("mlm", "clm"):
        watched(tmp_path / name, config={"objective": name, "seed": 0})
    runs = nerve.load_runs(tmp_path)
    assert runs["config_id"].nunique() == runs["design_id"].nunique() == 2
    assert flags(tmp_path) == ["ok", "ok"]
    points = nerve.final_metrics(nerve.load_metrics(tmp_path), runs, ["objective"])
    assert sorted(points["objective"]) == ["clm", "mlm"]
    nerve.RunRecord.load(tmp_path / "mlm").finish("interrupted")
    with pytest.raises(StoreError, match=r"other values of objective \(mlm, now clm\)"):
        watched(tmp_path / "mlm", config={"objective": "clm", "seed": 0})


def only(layer: int) -> Callable[[Net], dict]:
    def ask(model: Net) -> dict:
        ffn = model.ffns[layer]
        return {"ffns": [nerve.FFNAdapter(layer, "ffn", ffn[0], ffn[2])]}

    return ask


BY_FREQUENCY = {"groups": ["frequency"], "token_counts": torch.arange(9)}


@pytest.mark.parametrize(
    ("one", "other", "key"),
    [
        ({"ask": only(0)}, {"ask": only(1)}, "ffns"),
        ({"ask": only(0)}, {}, "ffns"),
        ({"mask": lambda batch: batch["input_ids"] < 8}, {}, "mask"),
        ({"exclude": [1]}, {"exclude": [2]}, "exclude"),
        (BY_FREQUENCY, {**BY_FREQUENCY, "token_counts": torch.ones(9)}, "token_counts"),
    ],
)
def test_measuring_something_else_is_another_run(tmp_path, one, other, key):
    """Neither repeats the other, and neither goes on in the other's directory."""
    watched(tmp_path / "one", **one)
    watched(tmp_path / "other", **other)
    assert flags(tmp_path) == ["ok", "ok"]
    nerve.RunRecord.load(tmp_path / "one").finish("interrupted")
    with pytest.raises(StoreError, match=rf"other values of monitor\.{key} "):
        watched(tmp_path / "one", **other)


def test_a_run_without_these_arguments_records_none_of_them(tmp_path):
    """So that its id stays as it was."""
    config = watched(tmp_path / "a")
    assert list(config) == ["monitor"]
    assert config["monitor"] == {
        "every_n_steps": 100,
        "steps": None,
        "source": "heldout",
        "spectra": "auto",
        "layers": None,
        "shortcut": True,
        "skip_first": 0,
        "groups": [],
        "groups_every": 1,
        "sites": [],
        "exclude": [],
        "only_labeled": False,
    }
    assert watched(tmp_path / "b", exclude=(5, 3, 3))["monitor"]["exclude"] == [3, 5]


def monitors(directory: Path) -> dict[str, Callable[..., object]]:
    """What a caller may measure a training with."""
    return {
        "watch": lambda **given: nerve.watch(Net(), directory, **given),
        "SpectralCallback": lambda **given: nerve.SpectralCallback(directory, **given),
        "SpectralMonitor": lambda **given: nerve.SpectralMonitor(directory, **given),
    }


NAMES = ("watch", "SpectralCallback", "SpectralMonitor")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"every_n_step": 5}, "an argument of nerve.NAME .*Did you mean 'every_n_steps'"),
        ({"select": "*.mlp"}, r"nerve.NAME has no argument select\. Give ffns=nerve.find_ffns"),
        ({"every_n_steps": 0}, "^every_n_steps must be null or a whole number of at least 1"),
        ({"every_n_steps": None}, "^every_n_steps or steps must be set"),
        ({"steps": "log"}, "^steps must be a list of steps"),
        ({"layers": "all"}, "^layers must be a list or null; got 'all'"),
        ({"groups": "halves"}, "^groups must be a list; got 'halves'"),
        ({"sites": ["inside"]}, "^an entry of sites must be one of"),
        ({"spectra": "yes"}, "^spectra must be true, false or auto; got 'yes'"),
        ({"shortcut": 1}, "^shortcut must be true or false or a string; got 1"),
        ({"skip_first": -1}, "^skip_first must be a whole number of at least 0; got -1"),
        ({"groups_every": 0}, "^groups_every must be a whole number of at least 1; got 0"),
        ({"config": {"monitor": 1}}, "^config must not have the names monitor, .*got monitor"),
        ({"config": {"lr": 1, "js": 2}}, r"got js, lr\. .*config={'group': {'js'"),
        ({"config": "mine"}, "^config must be a mapping by name"),
        ({"fingerprints": {"corpora": "ab"}}, "fingerprints must be one of.*mean 'corpus'"),
        ({"fingerprints": {"corpus": 5}}, "^A fingerprint must be a hash.*got corpus=int 5"),
        ({"config": {"text": 1}, "fingerprints": {"corpus": "ab"}}, "got text"),
    ],
)
def test_an_invalid_argument_is_named_as_the_caller_wrote_it(tmp_path, name, given, words):
    """By each of them, in the same words, and before a run begins."""
    with pytest.raises(ConfigError, match=words.replace("NAME", name)):
        monitors(tmp_path / "run")[name](**given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("watch", {"source": "heldout"}, r"no argument source\. Give heldout= the batches"),
        ("SpectralCallback", {"heldout": []}, r"no argument heldout\. Give source=\"heldout\""),
        ("SpectralCallback", {"last_step": 9}, r"no argument last_step\. The Trainer has it"),
        ("SpectralMonitor", {"heldout": []}, r"no argument heldout\. Give source=\"heldout\""),
        ("SpectralMonitor", {"token_counts": 1}, "The data module has it"),
        ("SpectralCallback", {"source": "eval"}, "^source must be one of heldout, train"),
        ("SpectralMonitor", {"source": "eval"}, "^source must be one of heldout, train"),
        ("watch", {"token_counts": torch.ones(9)}, "groups= has no frequency"),
        ("SpectralCallback", {"token_counts": torch.ones(9)}, "groups= has no frequency"),
        ("watch", {"groups": ["frequency"]}, "Groups by frequency need token_counts"),
        ("SpectralCallback", {"groups": ["frequency"]}, "Groups by frequency need token_counts"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, name, given, words):
    """Because another argument determines it, or nothing uses it."""
    with pytest.raises(ConfigError, match=words):
        monitors(tmp_path / "run")[name](**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resume": {"model": {}}}, "resume must be what state_dict .* got a mapping with model"),
        ({"resume": {}}, "got a mapping with nothing"),
        ({"last_step": "10"}, "last_step must be null or a whole number of at least 1; got '10'"),
    ],
)
def test_the_state_of_a_loop_is_checked_when_it_begins(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words), nerve.watch(Net(), tmp_path / "run", **given):
        pass
    assert not (tmp_path / "run").exists()


def test_help_shows_the_same_settings_and_defaults_for_all():
    """They differ only in what they measure by default."""
    settings = {each.name for each in fields(MonitorSettings)}
    defaults = {
        name: {
            key: parameter.default
            for key, parameter in inspect.signature(getattr(nerve, name)).parameters.items()
            if key in settings
        }
        for name in NAMES
    }
    assert defaults["watch"].keys() == settings - {"source"}
    assert defaults["SpectralCallback"].pop("source") == "train"
    assert defaults["SpectralMonitor"].pop("source") == "heldout"
    assert defaults["watch"] == defaults["SpectralCallback"] == defaults["SpectralMonitor"]
    assert MonitorSettings.of(**defaults["watch"]).groups == ()
    for name in (*NAMES, "measure"):
        kinds = {each.kind for each in inspect.signature(getattr(nerve, name)).parameters.values()}
        assert kinds <= {Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD}


def test_a_configuration_may_have_groups_and_recorded_names(tmp_path):
    """`ffn` is a column of metrics, `ffn.width` is not; `device` gets a column of its own."""
    watched(tmp_path, config={"ffn": {"width": 3}, "device": "cuda", "optimizer": {"lr": 0.1}})
    rows = nerve.load_metrics(tmp_path, ["ffn.width", "config.device", "optimizer.lr"])
    assert rows[
        ["ffn.width", "config.device", "optimizer.lr"]
    ].drop_duplicates().values.tolist() == [[3, "cuda", 0.1]]


def test_a_stored_run_goes_on_with_a_name_that_new_runs_must_not_have(tmp_path):
    """Runs that began before such names were refused are loaded and resumed."""
    state = {}

    def steps(config: dict, n: int, resume: dict | None = None) -> None:
        nonlocal state
        model = Net()
        with nerve.watch(model, tmp_path, heldout=HELDOUT, config=config, resume=resume) as run:
            for _ in range(n):
                run.step(0.5)
            state = run.state_dict()

    steps({"rate": 0.1}, 2)
    path = tmp_path / "run.json"
    stored = json.loads(path.read_text())
    stored["config"]["lr"] = stored["config"].pop("rate")
    path.write_text(json.dumps(stored | {"checksum": None}))
    steps({"lr": 0.1}, 1, state)
    assert sorted({*nerve.load_metrics(tmp_path)["step"]}) == [0, 2, 3]
    assert nerve.load_runs(tmp_path)["lr"].tolist() == [0.1]
    with pytest.raises(ConfigError, match="got js"):
        steps({"lr": 0.1, "js": 1}, 1, state)


def test_runs_on_different_corpora_are_not_pooled(tmp_path):
    """Their fingerprints are recorded, warn, separate the runs, and must stay the same."""
    for corpus in ("ab", "cd"):
        given = {"fingerprints": {"corpus": corpus, "tokenizer": "ef"}, "config": {"seed": 0}}
        config = watched(tmp_path / corpus, **given)
        assert config["text"] == {"corpus": corpus, "tokenizer": "ef"}
    with pytest.warns(nerve.FingerprintWarning, match=r"fingerprints\.corpus"):
        runs = nerve.Runs(tmp_path)
    assert runs.frame["fingerprints.corpus"].tolist() == ["ab", "cd"]
    assert runs.flags["data"].nunique() == 2
    points = nerve.final_metrics(runs.metrics, runs.frame)
    assert len(nerve.average_seeds(points)) == 2
    nerve.RunRecord.load(tmp_path / "ab").finish("interrupted")
    with pytest.raises(StoreError, match=r"other values of text\.corpus \(ab, now cd\)"):
        watched(tmp_path / "ab", **given)


@pytest.mark.parametrize("text", ["openwebtext", 3, {"corpus": "ab"}])
def test_a_value_of_ones_own_named_text_is_no_fingerprint(tmp_path, text):
    assert watched(tmp_path, config={"text": text})["text"] == text
    assert nerve.RunRecord.load(tmp_path).fingerprints == {}
