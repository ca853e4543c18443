"""Documents as full sequences of tokens, for any tokenizer: nothing is padded."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nerve.data.corpus import Corpus, sample_digests
from nerve.data.tokenizer import tokenizer_fingerprint
from nerve.errors import DataError

MOST_UNKNOWN = 0.25
"""The share of a text that may be unknown to a tokenizer."""

_BYTES_PER_TOKEN = 6
"""Of how much text a first sample is taken; more follows where that does not do."""


@dataclass(frozen=True)
class PackedText:
    """Sequences of tokens, and what they are of.

    Attributes:
        sequences: token ids, int64 `[n_sequences, seq_len]`.
        n_documents: how many documents they hold, the last one perhaps in part.
        fingerprints: of `corpus`, `tokenizer`, and these sequences (`heldout`).
    """

    sequences: np.ndarray
    n_documents: int
    fingerprints: dict[str, str]

    @property
    def unigram_loss(self) -> float:
        """Nats per token of the best prediction that knows no context: the entropy of the tokens
        that are predicted. A model whose loss stays above it has learned nothing from context."""
        _, counts = np.unique(self.sequences[:, 1:], return_counts=True)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())


def pack(corpus: Corpus, tokenizer: Any, *, seq_len: int, n_sequences: int) -> PackedText:
    """A sample of a corpus as sequences of equal length.

    Documents are taken in an order that is as good as random and depends on their contents alone,
    copies once. Each ends with the tokenizer's end of text (or its separator, where it has one of
    these), and they are laid end to end. What the tokenizer puts around a text, such as the token
    that begins it, stands around each sequence.

    Args:
        corpus: the documents.
        tokenizer: one of transformers.
        seq_len: tokens of a sequence.
        n_sequences: how many.

    Raises:
        DataError: for text that is too short, sequences that hold no text, and what `Corpus` and
            its reader refuse.
    """
    before, after = _around(tokenizer)
    n_inside = seq_len - len(before) - len(after)
    if n_inside < 1:
        raise DataError(
            f"A sequence must hold text beside the {len(before) + len(after)} tokens that the "
            f"tokenizer puts around it; got sequences of {seq_len} tokens. Make them longer."
        )
    ids, n_documents = _tokens(corpus, tokenizer, n_sequences * n_inside)
    inside = ids.reshape(n_sequences, n_inside)
    sides = [np.tile(np.array(side, np.int64), (n_sequences, 1)) for side in (before, after)]
    sequences = np.concatenate([sides[0], inside, sides[1]], axis=1)
    heldout = hashlib.sha256(sequences.astype("<i8").tobytes())
    heldout.update(str(sequences.shape).encode())
    fingerprints = {
        "corpus": corpus.fingerprint,
        "tokenizer": fingerprint_of(tokenizer),
        "heldout": heldout.hexdigest()[:16],
    }
    return PackedText(sequences, n_documents, fingerprints)


def fingerprint_of(tokenizer: Any) -> str:
    """16 hexadecimal digits over what decides how a tokenizer of transformers encodes a text; of
    one that is written in Python over its tokens and its class."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return tokenizer_fingerprint(fast)
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((type(tokenizer).__name__, tokens)).encode()).hexdigest()[:16]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that stand before and after a text."""
    text, whole = (_encoded(tokenizer, "a", special=special) for special in (False, True))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


def _encoded(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids; a special token that is written in the text is mere text."""
    ids = tokenizer(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]
    return [int(token) for token in ids]


def _tokens(corpus: Corpus, tokenizer: Any, n_tokens: int) -> tuple[np.ndarray, int]:
    """So many tokens of the corpus, and of how many documents."""
    ends = [getattr(tokenizer, name, None) for name in ("eos_token_id", "sep_token_id")]
    end = [token for token in ends if token is not None][:1]
    n_bytes, n_all = _BYTES_PER_TOKEN * n_tokens, sum(h.n_bytes for h in corpus.hashes)
    while True:
        ids: list[int] = []
        for n_documents, text in enumerate(_sample(corpus, n_bytes), 1):
            ids += _encoded(tokenizer, text) + end
            if len(ids) >= n_tokens:
                _require_known(ids, tokenizer, end)
                return np.array(ids[:n_tokens], np.int64), n_documents
        _require_known(ids, tokenizer, end)
        if n_bytes >= n_all:
            raise DataError(
                f"A measurement needs as much text as was asked for, {n_tokens:,} tokens; "
                f"{corpus.name} comes to {len(ids):,}. Give more text, or ask for fewer tokens."
            )
        n_bytes *= 2


def _require_known(ids: list[int], tokenizer: Any, end: list[int]) -> None:
    """Refuses a tokenizer that does not know what it reads, such as the one without tokens that
    transformers makes where there are no files of any."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    text = [token for token in ids if [token] != end]
    share = text.count(unknown) / max(1, len(text)) if unknown is not None else 0.0
    if share > MOST_UNKNOWN:
        raise DataError(
            f"A tokenizer must know the text; to this one ({type(tokenizer).__name__}, "
            f"{len(tokenizer):,} tokens) {share:.0%} of it is unknown. If the model's folder "
            "has no tokenizer, put its files there, or say with --tokenizer where it is."
        )


def _sample(corpus: Corpus, n_bytes: int) -> Iterator[str]:
    """The texts of a sample of the documents, in the order in which it was drawn."""
    chosen = sample_digests(corpus.hashes, n_bytes)
    texts = {
        hashed.digest: document.text
        for hashed, document in zip(corpus.hashes, corpus.documents(), strict=True)
        if hashed.digest in chosen
    }
    return (texts[digest] for digest in sorted(texts, key=lambda digest: digest[16:]))
