"""A run's tokenizer is found in the token cache by its fingerprint alone, or not at all."""

import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import nerve
from nerve.data.cache import cached_tokens
from nerve.data.cache_entry import TokenCache
from nerve.data.corpus import Corpus, Document
from nerve.data.tokenizer import TokenizerSpec
from nerve.errors import DataError, StoreError
from nerve.storage.record import RunRecord

TEXTS = [f"def f{i}(x): return naïve + {i} * λ₁  # <|endoftext|>" for i in range(20)]
CORPUS = Corpus("small", lambda: [Document(f"{i}.txt", text) for i, text in enumerate(TEXTS)])


@pytest.fixture
def caches(tmp_path, monkeypatch) -> Path:
    """Where caches are: the user's is `default`."""
    monkeypatch.setenv("NERVE_CACHE", str(tmp_path / "default"))
    return tmp_path


def entry(root: Path, vocab_size: int = 280, val_fraction: float = 0.2) -> TokenCache:
    return cached_tokens(CORPUS, TokenizerSpec(vocab_size), val_fraction, root)


def run_of(tokens: TokenCache, directory: Path, cache_dir: Path | None = None) -> Path:
    """A run on these tokens."""
    config = {"seed": 0, "data": {"cache_dir": cache_dir and str(cache_dir)}}
    fingerprints = {"tokenizer": tokens.meta.tokenizer_fingerprint}
    RunRecord.create(directory, config, fingerprints=fingerprints)
    return directory


def assert_encodes_as(tokenizer: Tokenizer, tokens: TokenCache) -> None:
    """The texts of the corpus have the ids that the cache has stored for training, and back."""
    end = tokenizer.token_to_id(tokens.meta.separator)
    stored = {tuple(tokenizer.encode(text).ids) for text in TEXTS}
    assert tokenizer.decode(tokenizer.encode(TEXTS[0]).ids) == TEXTS[0]
    ids = [*tokens.train.all().tolist(), *tokens.val.all().tolist()]
    while ids:
        length = ids.index(end)
        assert tuple(ids[:length]) in stored
        ids = ids[length + 1 :]


@pytest.mark.parametrize("vocab_size", [280, 300])
@pytest.mark.parametrize("is_set", [True, False])
def test_of_several_tokenizers_it_is_the_one_that_the_run_was_trained_with(
    caches, vocab_size, is_set
):
    """In the cache of data.cache_dir, or else in the user's."""
    root = caches / ("mine" if is_set else "default")
    own = {size: entry(root, size) for size in (280, 300)}[vocab_size]
    run = run_of(own, caches / "run", root if is_set else None)
    tokenizer = nerve.load_tokenizer(run)
    assert tokenizer.get_vocab_size() == vocab_size
    assert_encodes_as(tokenizer, own)


def test_a_cache_that_moved_is_the_one_in_the_environment(caches, monkeypatch):
    own = entry(caches / "mine")
    run = run_of(own, caches / "run", caches / "mine")
    (caches / "mine").rename(caches / "moved")
    with pytest.raises(DataError, match="no sound entry of"):
        nerve.load_tokenizer(run)
    monkeypatch.setenv("NERVE_CACHE", str(caches / "moved"))
    assert nerve.load_tokenizer(run).to_str() == own.tokenizer.to_str()


def test_a_changed_tokenizer_is_not_taken_but_another_entry_that_has_it_is(caches):
    """Another split of the corpus with the same tokenizer is another entry."""
    first = entry(caches / "default")
    file = caches / "tokenizer.json"
    first.tokenizer.save(str(file))
    run = run_of(first, caches / "run")
    path = first.path / "tokenizer.json"
    prefix = b'"add_prefix_space": '
    assert prefix + b"false" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(prefix + b"false", prefix + b"true"))  # still loads
    with pytest.raises(DataError, match=r"no sound entry of .*default has"):
        nerve.load_tokenizer(run)
    second = cached_tokens(CORPUS, TokenizerSpec(path=file), 0.3, caches / "default")
    assert second.path != first.path
    assert_encodes_as(nerve.load_tokenizer(run), second)


def test_without_the_cache_the_error_says_how_to_make_it_again(caches):
    own = entry(caches / "default")
    run = run_of(own, caches / "a run")
    other = run_of(entry(caches / "other", 300), caches / "other run")
    with pytest.raises(DataError, match=rf"NERVE_CACHE .* nerve-probe '{other}'\.$"):
        nerve.load_tokenizer(other)
    shutil.rmtree(caches / "default")
    with pytest.raises(DataError, match=own.meta.tokenizer_fingerprint):
        nerve.load_tokenizer(run)


@pytest.mark.parametrize(
    ("config", "fingerprints"),
    [
        ({"data": {"cache_dir": None}}, {}),  # its text is being read
        ({"data": {"cache_dir": None}}, {"corpus": "0", "heldout": "1"}),  # images
        ({"measure": {}}, {"tokenizer": "0"}),  # a model that was only measured
        ({"data": "mine"}, {"tokenizer": "0"}),  # a run of another program
    ],
)
def test_a_run_without_a_text_of_ours_has_none(tmp_path, config, fingerprints):
    RunRecord.create(tmp_path, config, "mine", fingerprints=fingerprints)
    with pytest.raises(StoreError, match=r"run mine in .* has none .* Choose a run on text"):
        nerve.load_tokenizer(tmp_path)


def test_no_run_is_an_error_that_says_so(tmp_path):
    with pytest.raises(StoreError, match=r"A run directory contains run\.json"):
        nerve.load_tokenizer(tmp_path)
