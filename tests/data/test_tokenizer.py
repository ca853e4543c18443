import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from nerve.data.tokenizer import (
    SEPARATORS,
    TokenizerSpec,
    load_tokenizer,
    separator_of,
    token_byte_lengths,
    tokenizer_fingerprint,
    train_tokenizer,
    vocab_size,
)
from nerve.errors import ConfigError, DataError

TEXTS = ["def forward(self, x):\n    return self.down(self.act(self.up(x)))\n" * 5, "λ₁ ≥ λ₂"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 290)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(TEXTS, 290).to_str() == tokenizer.to_str()


def test_any_text_is_encoded_without_loss(tokenizer):
    text = "".join(map(chr, range(1, 0x3000))) + "🎲\r\n\t  x"
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_the_vocabulary_is_the_asked_size_or_smaller_if_the_text_has_too_few_pairs(tokenizer):
    assert vocab_size(tokenizer) == 290
    assert vocab_size(train_tokenizer(["abc"], 1024)) < 265


def test_byte_lengths_of_a_text_add_up_to_its_utf8_size(tokenizer):
    for text in [*TEXTS, "naïve 🎲\n\n\tx  y", "\x00\x7f\xa0"]:
        assert token_byte_lengths(tokenizer)[encode(tokenizer, text)].sum() == len(text.encode())


def test_byte_lengths_are_those_of_each_tokens_own_bytes(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    merged = tokenizer.token_to_id("self")
    assert lengths[merged] == 4
    assert lengths[tokenizer.token_to_id(SEPARATORS[0])] == 0
    assert np.sum(lengths == 1) == 256


def test_the_separator_written_in_a_text_is_mere_text(tokenizer):
    ids = encode(tokenizer, f"a{SEPARATORS[0]}b")
    assert tokenizer.token_to_id(SEPARATORS[0]) not in ids
    assert tokenizer.decode(ids) == f"a{SEPARATORS[0]}b"


def test_a_tokenizer_that_was_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert encode(loaded, f"{TEXTS[0]}{SEPARATORS[0]}") == encode(
        tokenizer, f"{TEXTS[0]}{SEPARATORS[0]}"
    )
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)


def test_a_fingerprint_tells_tokenizers_apart(tokenizer):
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(train_tokenizer(TEXTS, 289))


def test_truncation_and_padding_of_a_file_are_switched_off(tokenizer, tmp_path):
    cutting = Tokenizer.from_str(tokenizer.to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=500)
    cutting.save(str(tmp_path / "tokenizer.json"))
    ids = encode(load_tokenizer(tmp_path / "tokenizer.json"), TEXTS[0])
    assert ids == encode(tokenizer, TEXTS[0])
    assert 4 < len(ids) < 500


def test_an_added_ordinary_token_counts_its_own_bytes(tokenizer):
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_tokens(["λλ"])
    assert token_byte_lengths(extended)[extended.token_to_id("λλ")] == 4


def test_a_vocabulary_with_holes_counts_to_its_largest_id(tokenizer, tmp_path):
    specification = json.loads(tokenizer.to_str())
    specification["model"]["vocab"]["Ġhole"] = 400
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(specification))
    assert vocab_size(load_tokenizer(path)) == 401
    assert token_byte_lengths(load_tokenizer(path)).shape == (401,)


def test_a_file_that_is_no_tokenizer_is_an_error_that_names_it(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match=r"other.json is not"):
        load_tokenizer(tmp_path / "other.json")


def test_a_tokenizer_that_is_not_byte_level_is_an_error(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, SEPARATORS[0]: 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(DataError, match=r"byte-level .*words.json is not"):
        load_tokenizer(tmp_path / "words.json")


def test_a_tokenizer_without_separator_is_an_error_with_the_names_that_are_known(
    tokenizer, tmp_path
):
    renamed = tokenizer.to_str().replace(SEPARATORS[0], "<|other|>")
    (tmp_path / "renamed.json").write_text(renamed)
    with pytest.raises(DataError, match=r"one of <\|endoftext\|>, .*</s>"):
        load_tokenizer(tmp_path / "renamed.json")


def test_a_vocabulary_below_the_bytes_and_a_separator_is_an_error():
    with pytest.raises(ConfigError, match=r"data\.vocab_size must be at least 257.*got 256"):
        TokenizerSpec(256)
    assert vocab_size(TokenizerSpec(257).build(TEXTS)) == 257


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(DataError, match=r"no file '.*absent.json'"):
        TokenizerSpec(path=tmp_path / "absent.json")


def test_a_tokenizer_that_cannot_be_read_is_not_a_cache_that_cannot_be_written():
    spec = TokenizerSpec(path=Path("/proc/self/mem"))  # a file whose reading fails, also for root
    with pytest.raises(DataError, match=r"/proc/self/mem is not \(Input/output error\)"):
        spec.key  # noqa: B018


def test_the_key_follows_the_contents_of_a_file_not_its_name(tokenizer, tmp_path):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        tokenizer.save(str(path))
    assert TokenizerSpec(path=paths[0]).key == TokenizerSpec(path=paths[1]).key
    paths[1].write_text(paths[1].read_text() + " ")
    assert TokenizerSpec(path=paths[0]).key != TokenizerSpec(path=paths[1]).key
    assert TokenizerSpec(1024).key != TokenizerSpec(1025).key


@pytest.mark.parametrize("start", ["~", "."])
def test_a_path_begins_at_home_or_where_it_was_given(tmp_path, monkeypatch, start):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train_tokenizer(TEXTS, 290).save("tokenizer.json")
    spec = TokenizerSpec(path=Path(start, "tokenizer.json"))
    monkeypatch.chdir("/")
    assert spec.build([]).get_vocab_size() == 290
    assert spec.key == TokenizerSpec(path=tmp_path / "tokenizer.json").key


def renamed(tokenizer: Tokenizer, token: str, path: Path) -> Path:
    """A file of `tokenizer` with another token in place of its separator."""
    path.write_text(tokenizer.to_str().replace(SEPARATORS[0], token), encoding="utf-8")
    return path


@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>", "<｜end▁of▁sentence｜>"])
def test_another_token_may_end_a_document(tokenizer, tmp_path, token):
    path = renamed(tokenizer, token, tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"has none.*data\.separator_token"):
        TokenizerSpec(path=path).build([])
    loaded = TokenizerSpec(path=path, separator=token).build([])
    assert separator_of(loaded, token) == token
    assert token not in loaded.decode(encode(loaded, f"a{token}b"), skip_special_tokens=True)[:1]


@pytest.mark.parametrize("token", ["<|im_end|>", "[SEP]"])
def test_a_trained_tokenizer_has_the_separator_that_is_asked_for(token):
    trained = TokenizerSpec(290, separator=token).build(TEXTS)
    assert separator_of(trained, token) == token
    assert trained.token_to_id(SEPARATORS[0]) is None


@pytest.mark.parametrize("token", ["<|absent|>", "self"])
def test_a_separator_that_is_no_special_token_is_an_error_with_those_that_there_are(
    tokenizer, tmp_path, token
):
    path = renamed(tokenizer, "<|im_end|>", tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match=r"data\.separator_token must be .*<\|im_end\|>.*; got"):
        TokenizerSpec(path=path, separator=token).build([])


def test_the_first_known_separator_is_taken_where_none_is_asked_for(tokenizer):
    extended = Tokenizer.from_str(tokenizer.to_str())
    extended.add_special_tokens(["</s>", "<|im_end|>"])
    assert separator_of(extended) == SEPARATORS[0]
    assert separator_of(extended, "<|im_end|>") == "<|im_end|>"


def test_the_key_tells_separators_apart(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "t.json"))
    for values in ({"path": tmp_path / "t.json"}, {}):
        keys = {TokenizerSpec(**values, separator=token).key for token in (None, "</s>", "<eos>")}
        assert len(keys) == 3
