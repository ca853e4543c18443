"""Packs documents into full sequences of tokens, without padding, for any tokenizer."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from nerve.data.corpus import Corpus, sample_digests
from nerve.data.tokenizer import tokenizer_fingerprint
from nerve.errors import DataError

MOST_UNKNOWN = 0.25
"""The largest share of a text that may be unknown to a tokenizer."""

_BYTES_PER_TOKEN = 6
"""Determines the size of the first sample of text; it is enlarged if it is not enough."""


@dataclass(frozen=True)
class PackedText:
    """Sequences of tokens, and where they come from.

    Attributes:
        sequences: token ids, int64 `[n_sequences, seq_len]`.
        n_documents: the number of documents in them; the last one may be cut off.
        fingerprints: of `corpus`, `tokenizer`, and these sequences (`heldout`).
    """

    sequences: np.ndarray
    n_documents: int
    fingerprints: dict[str, str]

    @property
    def unigram_loss(self) -> float:
        """Nats per token of the best prediction without context: the entropy of the target tokens.
        A model whose loss stays above it has learned nothing from context."""
        _, counts = np.unique(self.sequences[:, 1:], return_counts=True)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())


def pack(corpus: Corpus, tokenizer: Any, *, seq_len: int, n_sequences: int) -> PackedText:
    """Packs a sample of a corpus into sequences of equal length.

    Documents are taken in an effectively random order that depends only on their contents;
    duplicates are taken once. Each document ends with the tokenizer's end-of-text token (or its
    separator, if it has one of these), and the documents are concatenated. The tokens that the
    tokenizer adds before and after a text, such as a start token, are added to each sequence.

    Args:
        corpus: the documents.
        tokenizer: a tokenizer of transformers.
        seq_len: tokens per sequence.
        n_sequences: number of sequences.

    Raises:
        DataError: if there is too little text, if sequences are too short to contain any, and
            errors of `Corpus` and its reader.
    """
    before, after = _around(tokenizer)
    n_inside = seq_len - len(before) - len(after)
    if n_inside < 1:
        raise DataError(
            f"A sequence must have room for text in addition to the {len(before) + len(after)} "
            f"tokens that the tokenizer adds to it; got sequences of {seq_len} tokens. Make them "
            "longer."
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
    """A hash of everything that determines how a tokenizer of transformers encodes text, 16
    hexadecimal digits; for a tokenizer written in Python, a hash of its tokens and its class."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        return tokenizer_fingerprint(fast)
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((type(tokenizer).__name__, tokens)).encode()).hexdigest()[:16]


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text."""
    text, whole = (_encoded(tokenizer, "a", special=special) for special in (False, True))
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


def _encoded(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """Token ids; a special token that appears in the text is encoded as ordinary text."""
    ids = tokenizer(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]
    return [int(token) for token in ids]


def _tokens(corpus: Corpus, tokenizer: Any, n_tokens: int) -> tuple[np.ndarray, int]:
    """The first `n_tokens` tokens of a sample of the corpus, and the number of its documents."""
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
                f"The text must have at least the requested {n_tokens:,} tokens; "
                f"{corpus.name} has {len(ids):,}. Use more text, or request fewer tokens "
                "(--n-tokens)."
            )
        n_bytes *= 2


def _require_known(ids: list[int], tokenizer: Any, end: list[int]) -> None:
    """Rejects a tokenizer that does not know much of the text, such as the empty one that
    transformers creates if it finds no tokenizer files."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    text = [token for token in ids if [token] != end]
    share = text.count(unknown) / max(1, len(text)) if unknown is not None else 0.0
    if share > MOST_UNKNOWN:
        raise DataError(
            f"The tokenizer must fit the text; for this one ({type(tokenizer).__name__}, "
            f"{len(tokenizer):,} tokens) {share:.0%} of it is unknown. If the model's folder "
            "has no tokenizer, copy its files there, or pass its folder with --tokenizer."
        )


def _sample(corpus: Corpus, n_bytes: int) -> Iterator[str]:
    """The texts of a sample of the documents, in the order in which they were drawn."""
    chosen = sample_digests(corpus.hashes, n_bytes)
    texts = {
        hashed.digest: document.text
        for hashed, document in zip(corpus.hashes, corpus.documents(), strict=True)
        if hashed.digest in chosen
    }
    return (texts[digest] for digest in sorted(texts, key=lambda digest: digest[16:]))
