"""Documents become full sequences: every token once, in an order that depends on nothing else."""

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nerve.data.corpus import Corpus, Document
from nerve.data.packing import fingerprint_of, pack
from nerve.errors import DataError

END = 99


class Letters:
    """One token per letter, its position in the alphabet."""

    def __init__(self, before: Sequence[int] = (), after: Sequence[int] = (), **ends: Any) -> None:
        self._before, self._after = [*before], [*after]
        vars(self).update({"eos_token_id": END, "sep_token_id": None} | ends)

    def __call__(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> Any:
        assert split_special_tokens
        ids = [ord(letter) - ord("a") for letter in text]
        return {"input_ids": [*self._before, *ids, *self._after] if add_special_tokens else ids}

    def __len__(self) -> int:
        return 26

    def get_vocab(self) -> dict[str, int]:
        return {chr(ord("a") + i): i for i in range(26)}


def corpus(*texts: str) -> Corpus:
    return Corpus("some", lambda: [Document(str(i), text) for i, text in enumerate(texts)])


def in_order(*texts: str) -> list[str]:
    """In the order of the second half of their digests, in which the sample is drawn."""
    return sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest()[16:])


TEXTS = ("abc", "de", "fghij", "klmn", "de")


def test_documents_are_laid_end_to_end_each_with_its_end():
    """All tokens of all documents, duplicates once; the last tokens that do not fill a sequence are
    dropped."""
    packed = pack(corpus(*TEXTS), Letters(), seq_len=6, n_sequences=3)
    stream = [t for text in in_order(*TEXTS) for t in [*(ord(c) - 97 for c in text), END]]
    assert packed.sequences.tolist() == np.array(stream[:18]).reshape(3, 6).tolist()
    assert packed.sequences.dtype == np.int64
    assert packed.n_documents == 4


def test_the_unigram_loss_is_the_entropy_of_what_is_predicted():
    """The targets are three a, two b and one end token: ln 6 - (3 ln 3 + 2 ln 2) / 6."""
    packed = pack(corpus("aaaabb"), Letters(), seq_len=7, n_sequences=1)
    expected = np.log(6) - (3 * np.log(3) + 2 * np.log(2)) / 6
    assert packed.unigram_loss == pytest.approx(expected, rel=1e-12)


def test_what_stands_around_a_text_stands_around_each_sequence():
    around = pack(corpus(*TEXTS), Letters([50], [51, 52]), seq_len=9, n_sequences=3)
    plain = pack(corpus(*TEXTS), Letters(), seq_len=6, n_sequences=3)
    assert around.sequences[:, 1:-2].tolist() == plain.sequences.tolist()
    assert set(around.sequences[:, 0]) == {50}
    assert around.sequences[:, -2:].tolist() == [[51, 52]] * 3


def test_the_order_of_the_documents_does_not_matter_but_their_texts_do():
    one = pack(corpus(*TEXTS), Letters(), seq_len=6, n_sequences=3)
    other = pack(corpus(*TEXTS[::-1]), Letters(), seq_len=6, n_sequences=3)
    assert one.sequences.tolist() == other.sequences.tolist()
    assert one.fingerprints["heldout"] == other.fingerprints["heldout"]
    changed = pack(corpus("abd", *TEXTS[1:]), Letters(), seq_len=6, n_sequences=3)
    assert changed.fingerprints["corpus"] != one.fingerprints["corpus"]
    assert changed.fingerprints["heldout"] != one.fingerprints["heldout"]


def test_more_documents_are_read_where_a_first_sample_does_not_do():
    """Six bytes per token are not enough if a token is ten letters."""

    class Tens(Letters):
        def __call__(self, text: str, **how: Any) -> Any:
            return {"input_ids": super().__call__(text, **how)["input_ids"][::10]}

    texts = ["".join(chr(97 + (i * j + i // 26) % 26) for j in range(40)) for i in range(1, 60)]
    packed = pack(corpus(*texts), Tens(), seq_len=5, n_sequences=50)
    assert packed.sequences.shape == (50, 5)


@pytest.mark.parametrize(("ends", "n"), [({}, 18), ({"eos_token_id": None}, 14)])
def test_text_that_is_too_short_is_said_with_what_there_is(ends, n):
    with pytest.raises(DataError, match=f"24 tokens; some has {n}"):
        pack(corpus(*TEXTS), Letters(**ends), seq_len=6, n_sequences=4)


@pytest.mark.parametrize(("unknown", "fails"), [(3, True), (1, False), (END, False), (None, False)])
def test_a_tokenizer_must_know_three_quarters_of_the_text(unknown, fails):
    """In "bddd", three of four letters are token 3. A tokenizer whose unknown token is its end of
    text, like GPT-2's, knows every text."""
    texts = corpus("bddd", "dbdd")
    tokenizer = Letters(unk_token_id=unknown)
    if fails:
        with pytest.raises(DataError, match=r"26 tokens\) 75% of it is unknown"):
            pack(texts, tokenizer, seq_len=5, n_sequences=2)
    else:
        assert pack(texts, tokenizer, seq_len=5, n_sequences=2).n_documents == 2


def test_a_sequence_must_hold_text():
    with pytest.raises(DataError, match="sequences of 3 tokens"):
        pack(corpus(*TEXTS), Letters([1, 2], [3]), seq_len=3, n_sequences=1)


def test_a_tokenizer_in_python_is_told_by_its_tokens():
    other = SimpleNamespace(get_vocab=lambda: {"a": 1})
    assert fingerprint_of(Letters()) == fingerprint_of(Letters()) != fingerprint_of(other)
