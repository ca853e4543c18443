"""Byte-level BPE tokenizers: trained here or read from a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nerve.config import require, require_type
from nerve.data.progress import counted, progress
from nerve.errors import DataError
from nerve.files import absolute

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that end a document, by preference; a trained tokenizer has the first."""

N_BYTES = 256


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer a corpus gets: one that is trained on it, or one that is read from a file.

    Args:
        vocab_size: tokens of a tokenizer trained here, the separator included; at least 257.
        path: a tokenizer.json (of a byte-level model) that is used in its place.
        separator: the token that ends a document; None takes the first of `SEPARATORS`.
        sample_bytes: of how much text a tokenizer is trained at most.

    Raises:
        ConfigError: for values of another type, and a sample of nothing.
        DataError: for one below 257 and for a file that is none.
    """

    vocab_size: int = 1024
    path: Path | None = None
    separator: str | None = None
    sample_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", absolute(self.path))
        require_type("data.vocab_size", self.vocab_size, int)
        require_type("data.separator_token", self.separator, str, NoneType)
        require_type("data.tokenizer_sample_bytes", self.sample_bytes, int)
        require(
            self.sample_bytes >= 1,
            f"data.tokenizer_sample_bytes must be at least 1; got {self.sample_bytes}.",
        )
        if self.vocab_size <= N_BYTES:
            raise DataError(
                f"vocab_size must be at least {N_BYTES + 1}, one token for each byte and the "
                f"document separator; got {self.vocab_size}."
            )
        if self.path is not None and not self.path.is_file():
            raise DataError(
                f"A tokenizer must be a tokenizer.json; there is no file {str(self.path)!r}. "
                "Check the path, or leave it out to train a tokenizer on the corpus."
            )

    @property
    def key(self) -> str:
        """What names the tokenizer in the key of the token cache."""
        if self.path is None:
            decisive: list = ["bpe", self.vocab_size, self.sample_bytes]
        else:
            decisive = ["file", hashlib.sha256(self.path.read_bytes()).hexdigest()]
        return json.dumps([*decisive, self.separator])

    def build(self, texts: Iterable[str], n_bytes: int | None = None) -> Tokenizer:
        """The tokenizer; `texts`, of `n_bytes` in all, are read only if it is to be trained."""
        if self.path is not None:
            return load_tokenizer(self.path, self.separator)
        with progress("training the tokenizer", n_bytes) as add:
            sample = _first_bytes(counted(texts, add), self.sample_bytes)
            return train_tokenizer(sample, self.vocab_size, self.separator or SEPARATORS[0])


def _first_bytes(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The texts, of which the last is cut where they come to `n_bytes`."""
    for text in texts:
        encoded = text.encode()
        if len(encoded) >= n_bytes:
            yield encoded[:n_bytes].decode(errors="ignore")
            return
        yield text
        n_bytes -= len(encoded)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, separator: str = SEPARATORS[0]
) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); it is deterministic.

    A small corpus may not have enough different pairs: then the vocabulary is smaller than asked.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_plain_encoder(tokenizer)


def load_tokenizer(path: Path, separator: str | None = None) -> Tokenizer:
    """Reads a tokenizer.json; padding and truncation that it may ask for are switched off.

    Raises:
        DataError: if the file cannot be read, is not byte-level or has no document separator, or
            not the one that is asked for.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare `Exception`
        raise DataError(
            f"A tokenizer.json must be one that the package tokenizers reads; {path} is not: "
            f"{error}. Save the tokenizer again."
        ) from error
    if '"ByteLevel"' not in json.dumps(_specification(tokenizer)["decoder"]):
        raise DataError(
            f"A tokenizer must be byte-level (GPT-2, GPT-NeoX, Llama 3, Qwen), so that each token "
            f"stands for a known number of bytes; {path} is not. Use such a one, or leave it out "
            "to train one on the corpus."
        )
    separator_of(tokenizer, separator)
    return _as_plain_encoder(tokenizer)


def separator_of(tokenizer: Tokenizer, wanted: str | None = None) -> str:
    """The token that ends a document: the one `wanted`, else the first of `SEPARATORS` there is.

    Raises:
        DataError: if there is none, or the one wanted is no special token of this tokenizer.
    """
    special = [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    there = ", ".join(special) or "none"
    if wanted is not None:
        if wanted not in special:
            raise DataError(
                f"data.separator_token must be a special token of the tokenizer, of {there}; "
                f"got {wanted!r}. Take one of them, or add it to the file."
            )
        return wanted
    for token in SEPARATORS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"A tokenizer must have a document separator, one of {', '.join(SEPARATORS)}; this one "
        f"has none. Say with data.separator_token which of its special tokens ends a document "
        f"({there})."
    )


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id stands for, int64 `[vocab_size]`; 0 for special tokens.

    A byte-level vocabulary writes each byte as one printable character, so the length of an
    ordinary token's string is its number of bytes. Added tokens are written as they are.
    """
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    return lengths


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hexadecimal digits over all that decides how a text is encoded."""
    specification = _specification(tokenizer)
    decisive = {
        key: specification[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _specification(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def _as_plain_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """Every character of a document counts: nothing cut or padded, no special token in the text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" written in a document is mere text
    return tokenizer
