"""Where `nerve-probe` looks for a model: what is no path here, and whether the hub answers."""

import re
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import HfHubHTTPError

from nerve.cli.probing.folders import Folders
from nerve.cli.probing.hub import TIMEOUT_S, check_hub
from nerve.cli.probing.places import is_on_hub
from nerve.cli.probing.source import ProbeArguments
from nerve.errors import DataError

ON_HUB = ("gpt2", "EleutherAI/pythia-70m", "EleutherAI/pythia-70m@step1000", "ckpt/step_2@main")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ckpt/step_1").mkdir(parents=True)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """The requests to the hub and their timeouts; it does not answer."""
    asked: list[tuple[str, float]] = []

    def ask(url: str, timeout: float) -> None:
        asked.append((url, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    return asked


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("./ckpt/stpe_1", "there is no ./ckpt/stpe_1. Similar names: ckpt/step_1. Check"),
        (
            "ckpt/stpe_1",
            "the folder ckpt exists, and has no stpe_1. Similar names: ckpt/step_1. Check",
        ),
        ("ckpt/other", "the folder ckpt exists, and has no other. Check"),
        ("ckpts/step_1/model", "there is no ckpts/step_1/model. Similar names: ckpt. Check"),
        ("ckpt/step_1/a/b", "there is no ckpt/step_1/a/b. Check"),
        ("/nowhere/step_1", "there is no /nowhere/step_1. Check"),
    ],
)
def test_a_misspelled_path_gets_similar_names(place, words):
    with pytest.raises(DataError, match=re.escape(words)):
        is_on_hub(place)


def test_a_tokenizer_is_searched_for_like_a_model():
    with pytest.raises(
        DataError, match=r"A tokenizer is a folder or .* has no stpe_1. Similar names: "
    ):
        Folders(ProbeArguments(("gpt2",), tokenizer="ckpt/stpe_1"))


def test_names_on_the_hub_are_distinguished_from_local_paths():
    assert all(map(is_on_hub, ON_HUB))
    assert not is_on_hub("ckpt/step_1")


def test_an_unreachable_hub_is_asked_once(requests):
    """transformers would ask six times, with pauses of 23 s in total."""
    with pytest.raises(
        DataError, match=r"cpkt is not a folder here, .* be reached \(timed out\). Sim"
    ):
        check_hub(["cpkt", "gpt2"])
    ((url, timeout),) = requests
    assert url.endswith("/cpkt/resolve/main/config.json")
    assert timeout == TIMEOUT_S


def test_an_answer_of_the_hub_is_left_to_transformers(monkeypatch):
    """Including that it has no such model; further names are not requested."""
    asked = []

    def ask(url: str, timeout: float) -> None:
        asked.append(url)
        raise HfHubHTTPError.__new__(HfHubHTTPError)  # versions differ in what it is made of

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    check_hub(["org/model@step1000", "gpt2"])
    assert [url.partition("/org/")[2] for url in asked] == ["model/resolve/step1000/config.json"]


def test_cached_models_need_no_hub(requests, monkeypatch):
    cached = {("org/model", "config.json", "step1"), ("org/tokens", "tokenizer_config.json", None)}

    def find(name: str, file: str, revision: str | None = None) -> str | None:
        return "here" if (name, file, revision) in cached else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", find)
    check_hub(["org/model@step1", "org/tokens"])
    assert requests == []
    with pytest.raises(DataError, match="org/model@step2 is not a folder here"):
        check_hub(["org/model@step1", "org/model@step2"])


def test_an_impossible_name_on_the_hub_is_refused_without_a_request(requests):
    with pytest.raises(DataError, match=r"there is none of that name on the hub \(.*\.git"):
        check_hub(["model.git"])
    assert requests == []
