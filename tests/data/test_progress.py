import logging
import time

import pytest

from nerve.data import progress as progress_module
from nerve.data.cache import cached_tokens
from nerve.data.corpus import Corpus
from nerve.data.progress import progress
from nerve.data.tokenizer import TokenizerSpec


@pytest.fixture(autouse=True)
def _often(monkeypatch, caplog):
    monkeypatch.setattr(progress_module, "EVERY_S", 0.002)
    caplog.set_level(logging.INFO)


def until(caplog, message: str) -> None:
    """Waits for a message, because the machine determines when the thread runs."""
    for _ in range(5_000):
        if message in caplog.messages:
            return
        time.sleep(0.002)
    raise AssertionError(f"{message!r} was not said, but {caplog.messages[-3:]}")


@pytest.fixture
def _no_second_passes(monkeypatch):
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: 7.0)


@pytest.mark.usefixtures("_no_second_passes")
def test_a_block_that_takes_long_says_how_far_it_is(caplog):
    with progress("counting", n_bytes=5_000_000) as add:
        for n in (1, 2, 3, 4):
            add(1_000_000)
            until(caplog, f"counting: {n}.0 MB of 5.0 MB, 0 s")
    n_said = len(caplog.messages)
    time.sleep(0.01)
    assert len(caplog.messages) == n_said


@pytest.mark.usefixtures("_no_second_passes")
def test_of_an_unknown_size_it_says_what_is_done_also_when_the_block_fails(caplog):
    def fail():
        with progress("reading") as add:
            add(2_500_000)
            until(caplog, "reading: 2.5 MB, 0 s")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    n_said = len(caplog.messages)
    time.sleep(0.01)
    assert len(caplog.messages) == n_said


def test_a_quick_block_says_nothing(caplog, monkeypatch):
    monkeypatch.setattr(progress_module, "EVERY_S", 60)
    with progress("reading"):
        pass
    assert not caplog.messages


@pytest.mark.parametrize(
    "doing",
    ["reading the corpus slow", "training the tokenizer", "writing train.tokens"],
)
def test_each_long_part_of_a_build_says_how_far_it_is(make_corpus, tmp_path, caplog, doing):
    def read():
        for document in make_corpus(f"{i} " + "word " * 500 for i in range(20)).documents():
            time.sleep(0.001)
            yield document

    cached_tokens(Corpus("slow", read), TokenizerSpec(300), 0.2, tmp_path)
    assert any(message.startswith(f"{doing}: ") for message in caplog.messages)


def test_the_merges_of_a_tokenizer_are_not_silent(caplog):
    """They are computed in one call, during which only a thread can log."""
    TokenizerSpec(2000).build(["".join(map(chr, range(200, 9000))) * 3])
    said = [message for message in caplog.messages if message.startswith("training the tokenizer")]
    assert len(said) > 2
