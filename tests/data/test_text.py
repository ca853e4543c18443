import hashlib
import math
import os

import numpy as np
import pytest
import torch

from nerve.data import cache_entry as entry_module
from nerve.data.cache import cached_tokens
from nerve.data.corpus import python_source
from nerve.data.text import TextDataModule
from nerve.data.tokenizer import TokenizerSpec
from nerve.errors import ConfigError, DataError

VALUES = {
    "seq_len": 16,
    "batch_size": 4,
    "n_train_batches": 12,
    "n_heldout_tokens": 500,
    "seed": 0,
    "vocab_size": 300,
    "val_fraction": 0.2,
}


@pytest.fixture
def make(small_corpus, tmp_path):
    """Makes a module that is set up, by default with the small corpus."""

    def make(corpus=small_corpus, **changes):
        module = TextDataModule(corpus, cache_dir=tmp_path, **(VALUES | changes))
        module.setup()
        return module

    return make


@pytest.fixture
def tokens(small_corpus, tmp_path):
    return cached_tokens(small_corpus, TokenizerSpec(300), 0.2, tmp_path)


def targets_of(batches) -> torch.Tensor:
    return torch.cat([targets.flatten() for _, targets in batches])


def test_batches_are_int64_and_targets_are_the_next_tokens(make):
    for inputs, targets in [*make().train_dataloader(), *make().val_dataloader()]:
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        assert targets.is_contiguous()
        assert inputs.shape == targets.shape
        assert inputs.shape[1] == 16
        assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_epoch_has_every_token_but_the_first_as_a_target_once(make, tokens):
    n_windows = (len(tokens.train) - 1) // 16
    module = make(batch_size=1, n_train_batches=n_windows)
    inputs, targets = (torch.cat(split) for split in zip(*module.train_dataloader(), strict=True))
    start = {
        tuple(row): i for i, row in enumerate(tokens.train.all()[: n_windows * 16].reshape(-1, 16))
    }
    order = np.argsort([start[tuple(row)] for row in inputs.numpy()])
    np.testing.assert_array_equal(
        targets.numpy()[order].ravel(), tokens.train.all()[1 : n_windows * 16 + 1]
    )


def test_the_training_loader_has_its_length_and_follows_the_seed(make):
    batches = [targets_of(make(seed=seed).train_dataloader()) for seed in (0, 0, 1)]
    assert len(make().train_dataloader()) == 12
    assert len(batches[0]) == 12 * 4 * 16
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_the_held_out_set_is_the_same_whatever_the_seed_and_the_batch_size(make):
    one, other = make(), make(seed=9, batch_size=7, n_train_batches=3)
    assert torch.equal(targets_of(one.val_dataloader()), targets_of(other.val_dataloader()))
    assert torch.equal(targets_of(one.val_dataloader()), targets_of(one.val_dataloader()))
    assert one.fingerprints == other.fingerprints


@pytest.mark.parametrize("token", [None, "<|im_end|>", "</s>"])
def test_the_separator_that_is_taken_ends_documents_counts_no_bytes_and_is_said(
    make, small_texts, tmp_path, token
):
    module = make(separator_token=token)
    taken = token or "<|endoftext|>"
    assert module.describe()["separator"] == module.separator_token == taken
    other = make(separator_token=token, n_heldout_tokens=600)
    tokens = other._tokens
    separator = tokens.tokenizer.token_to_id(taken)
    both = np.concatenate([tokens.train.all(), tokens.val.all()])
    assert np.sum(both == separator) == len(small_texts)
    targets = targets_of(other.val_dataloader()).tolist()
    text = tokens.tokenizer.decode(targets, skip_special_tokens=True)
    assert other.n_heldout_bytes == pytest.approx(len(text.encode()), abs=8)


def test_held_out_tokens_are_rounded_up_to_sequences_and_the_last_batch_is_smaller(make):
    module = make()
    assert [len(inputs) for inputs, _ in module.val_dataloader()] == [4] * 8
    assert module.n_heldout_tokens == 512 == len(targets_of(module.val_dataloader()))
    sizes = [len(inputs) for inputs, _ in make(n_heldout_tokens=513).val_dataloader()]
    assert sizes == [4] * 8 + [1]


def test_held_out_windows_are_spread_evenly_over_the_validation_stream(make, tokens):
    n_windows = (len(tokens.val) - 1) // 16
    inputs = torch.cat([inputs for inputs, _ in make().val_dataloader()]).numpy()
    windows = tokens.val.all()[: n_windows * 16].reshape(-1, 16)
    chosen = [np.flatnonzero((windows == row).all(axis=1))[0] for row in inputs]
    gaps = np.diff([*chosen, n_windows])
    assert chosen[0] == 0
    assert gaps.max() - gaps.min() <= 1
    assert n_windows > 1.5 * len(inputs)


def test_held_out_bytes_are_those_of_the_decoded_targets(make, tokens):
    """With the whole validation split held out, all its bytes count except those of the first
    token."""
    module = make(seq_len=1, n_heldout_tokens=len(tokens.val) - 1)
    text = tokens.tokenizer.decode(tokens.val.all()[1:].tolist(), skip_special_tokens=True)
    assert module.n_heldout_bytes == len(text.encode())


def test_unigram_loss_is_the_smoothed_cross_entropy_of_the_training_frequencies(make, tokens):
    module = make()
    counts = np.bincount(tokens.train.all(), minlength=module.vocab_size) + 1
    targets = targets_of(module.val_dataloader()).numpy()
    expected = -np.mean([math.log(counts[token] / counts.sum()) for token in targets])
    assert module.unigram_loss == pytest.approx(expected, rel=1e-12)
    assert 0 < module.unigram_loss < math.log(module.vocab_size)


def test_the_vocabulary_is_the_tokenizers_real_size(make, make_corpus, tmp_path):
    assert make().vocab_size == 300
    few_pairs = make(make_corpus(["ab " * 40, "ba " * 40]), vocab_size=5000, n_heldout_tokens=16)
    assert 257 < few_pairs.vocab_size < 270
    path = tmp_path / "tokenizer.json"
    make(vocab_size=280)._cache.tokenizer.save(str(path))
    assert make(tokenizer=path, vocab_size=400).vocab_size == 280


def test_fingerprints_tell_apart_what_differs(make, make_corpus, small_texts):
    original = make().fingerprints
    assert set(original) == {"corpus", "tokenizer", "heldout"}
    same_corpus = make(vocab_size=290).fingerprints
    assert same_corpus["corpus"] == original["corpus"]
    assert same_corpus["tokenizer"] != original["tokenizer"]
    assert make(n_heldout_tokens=600).fingerprints["heldout"] != original["heldout"]
    assert make(make_corpus(small_texts[1:])).fingerprints["corpus"] != original["corpus"]


def test_the_description_counts_the_data(make, tokens, small_texts):
    module = make(n_train_batches=100)
    described = module.describe()
    assert described["n_documents"] == len(small_texts)
    assert described["n_train_tokens"] == len(tokens.train)
    assert described["n_train_epochs"] == 400 / ((len(tokens.train) - 1) // 16)
    assert described["n_heldout_bytes"] == module.n_heldout_bytes


def test_prepare_and_setup_may_be_called_again_and_keep_the_data(make):
    module = make()
    cache = module._cache
    module.prepare_data()
    module.setup("fit")
    assert module._cache is cache


def test_asking_before_setup_is_an_error_that_says_so(small_corpus):
    with pytest.raises(DataError, match=r"Call setup\(\)"):
        _ = TextDataModule(small_corpus, **VALUES).vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1; got 0"),
        ({"n_heldout_tokens": 0}, "monitor.n_tokens must be at least 1; got 0"),
        ({"val_fraction": 1.0}, "data.val_fraction must be above 0 and below 1; got 1.0"),
        ({"val_fraction": 0}, "data.val_fraction must be above 0 and below 1; got 0"),
    ],
)
def test_values_out_of_range_are_errors_that_name_them(small_corpus, changes, message):
    with pytest.raises(ConfigError, match=message):
        TextDataModule(small_corpus, **(VALUES | changes))


def test_a_vocabulary_below_257_is_an_error(small_corpus):
    with pytest.raises(ConfigError, match=r"at least 257.*got 256"):
        TextDataModule(small_corpus, **(VALUES | {"vocab_size": 256}))


@pytest.mark.parametrize(("split", "pick"), [("validation", min), ("training", max)])
def test_a_split_shorter_than_a_window_is_an_error_that_names_both_lengths(
    make, make_corpus, split, pick
):
    """The document with the smallest digest is held out: pick a short one before or after it."""
    short = pick("abcdefgh", key=lambda text: hashlib.sha256(text.encode()).digest())
    with pytest.raises(DataError, match=rf"The {split} split .*17 tokens; .* has 2\. Lower"):
        make(make_corpus([short, "x" * 900]), val_fraction=0.001, vocab_size=257)


def test_more_held_out_tokens_than_there_are_is_an_error_with_both_numbers(make, tokens):
    available = (len(tokens.val) - 1) // 16 * 16
    assert make(n_heldout_tokens=available).n_heldout_tokens == available
    with pytest.raises(
        DataError, match=rf"got {available + 16} .* has {available}\. .* raise data.val_fraction"
    ):
        make(n_heldout_tokens=available + 1)


def test_the_standard_library_has_a_held_out_set_of_more_than_100_000_tokens():
    module = TextDataModule(
        python_source(),
        seq_len=256,
        batch_size=8,
        n_train_batches=1,
        n_heldout_tokens=100_000,
        seed=0,
    )
    module.prepare_data()
    assert module.vocab_size == 1024
    described = module.describe()
    assert described["n_val_tokens"] > 150_000
    assert described["n_train_tokens"] > 10 * described["n_val_tokens"]
    assert 2 < module.n_heldout_bytes / module.n_heldout_tokens < 4
    assert 5.5 < module.unigram_loss < 6.5


@pytest.mark.parametrize("name", ["train.tokens", "val.tokens"])
@pytest.mark.parametrize(
    "change", [lambda data: bytes(len(data)), lambda data: data[2:] + data[:2]]
)
def test_tokens_that_changed_behind_the_files_time_are_refused_when_used_and_then_built_again(
    make, tokens, name, change
):
    path = tokens.path / name
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(change(before))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    module = make()
    with pytest.raises(DataError, match=rf"{name} .* is not what was written.*Start again"):
        list(module.train_dataloader() if name == "train.tokens" else module.val_dataloader())
    list(make().train_dataloader())
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("sizes", "share"),
    [
        ([1] * 20 + [200], 100),
        ([1] * 20 + [30, 30, 30], 34),
        ([1, 1, 160, 1, 1, 1], 99),
        ([1] * 5 + [100], 0),
    ],
)
def test_one_document_that_is_most_of_the_validation_split_is_warned_of_at_every_start(
    make, make_corpus, monkeypatch, caplog, sizes, share
):
    """The validation split is chosen by size here, large documents first. Documents below 64 kB,
    like the parts of a text that was cut, cause no warning."""
    texts = [f"{i} " + "word " * 100 * size for i, size in enumerate(sizes)]
    corpus = make_corpus(texts)
    largest = sizes.index(max(sizes))
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    chosen = frozenset(digests[i] for i in by_size[: 3 if share == 34 else 1 + (share == 99)])
    monkeypatch.setattr(entry_module, "validation_digests", lambda *_: chosen)
    for _ in range(2):
        caplog.clear()
        make(corpus, n_heldout_tokens=16)
        warned = [message for message in caplog.messages if "of the validation split" in message]
        assert len(warned) == (share > 50)
        assert all(f"mostly its own: {largest}.txt of small" in message for message in warned)
