"""Keys of paths accept any path literally, and what is printed can be pasted into a shell."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from nerve.cli.config.overrides import with_literal_paths
from nerve.config import pasted

NAMES = [
    "a=b",
    "a,b",
    "a(1)",
    "a#b",
    "a~b",
    "a b",
    "Größe",
    "lr=1,seed=0 (2)",
    "a'b",
    "12",
    "[x",
    "a{",
]


def value_of(argument: str) -> object:
    (literal,) = with_literal_paths([argument])
    return OverridesParser.create().parse_overrides([literal])[0].value()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["resume", "hydra.run.dir", "hydra.sweep.dir", "data.cache_dir"])
def test_a_path_is_used_literally(key, name):
    assert value_of(f"{key}=out/{name}") == f"out/{name}"
    assert value_of(f"{key}={name}") == name


@pytest.mark.parametrize("name", ["a=b", "a(1)", "a#b", "~/a", "Größe", "a b=c, d"])
@pytest.mark.parametrize(
    "key", ["data.tokenizer", "data.corpus.paths", "data.images.path", "+data.corpus.roots"]
)
def test_a_data_path_that_hydra_cannot_parse_is_used_literally(key, name):
    assert value_of(f"{key}={name}") == name


def test_a_separator_is_used_literally():
    assert value_of("data.corpus.separator=<|endoftext|>") == "<|endoftext|>"
    assert value_of("data.separator_token=</s>") == "</s>"


@pytest.mark.parametrize(
    "argument",
    [
        *("data.tokenizer=a.json,b.json", "data.corpus.paths=[a.txt,b.txt]", "data.tokenizer=null"),
        *("hydra.run.dir=out/${seed}", "resume='a=b'", "seed=a=b", "-m", "--config-name=a=b"),
        *("data.corpus.paths=corpus/**/*.txt", "data.corpus.roots=[stdlib,site-packages]"),
    ],
)
def test_values_that_hydra_reads_correctly_are_unchanged(argument):
    assert with_literal_paths([argument]) == [argument]


@pytest.mark.parametrize("name", ["a,b.txt", "a b, c", "a,b,"])
def test_a_file_name_with_a_comma_is_not_a_choice(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    assert value_of(f"data.corpus.paths={name}") == name
    assert value_of(f"data.tokenizer={tmp_path / name}") == str(tmp_path / name)


@pytest.mark.parametrize("given", ["~/runs/a", "'~/runs/a'", "~"])
@pytest.mark.parametrize("key", ["resume", "hydra.run.dir", "hydra.sweep.dir"])
def test_the_home_directory_is_expanded_in_directories_that_hydra_creates(monkeypatch, key, given):
    monkeypatch.setenv("HOME", "/home/me")
    assert value_of(f"{key}={given}") == given.strip("'").replace("~", "/home/me")


@pytest.mark.parametrize(
    "name", ["a=b", "a,b", "a(1)", "a#b", "a~b", " a b", "Größe", "a'b", "s=[0]"]
)
def test_a_run_in_a_directory_of_any_name_is_resumed_with_the_printed_command(
    run, experiments, tmp_path, name
):
    assert run(f"hydra.run.dir=out/{name}", "seed=3")[::2] == (0, "")
    for line in (pasted("resume", f"out/{name}"), pasted("resume", tmp_path / "out" / name)):
        assert run(*shlex.split(line))[::2] == (0, "")
    assert {directory for _, directory in experiments} == {tmp_path / "out" / name}
    assert [config.seed for config, _ in experiments] == [3, 3, 3]


@pytest.mark.parametrize("name", ["a=b", "a (1), b", "Größe"])
def test_check_names_a_directory_of_any_name(run, tmp_path, name):
    status, out, err = run("check=true", f"hydra.run.dir={name}")
    assert (status, err) == (0, "")
    assert f"what would run in {name}" in out
    assert not list(tmp_path.iterdir())
