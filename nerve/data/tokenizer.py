"""Byte-level BPE tokenizers: trained here or read from a tokenizer.json."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nerve.config import require_type
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

    Raises:
        ConfigError: for a `vocab_size` that is no whole number.
        DataError: for one below 257 and for a file that is none.
    """

    vocab_size: int = 1024
    path: Path | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            object.__setattr__(self, "path", absolute(self.path))
        require_type("data.vocab_size", self.vocab_size, int)
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
            return f"bpe:{self.vocab_size}"
        return f"file:{hashlib.sha256(self.path.read_bytes()).hexdigest()}"

    def build(self, texts: Iterable[str]) -> Tokenizer:
        """The tokenizer; `texts` are read only if it is to be trained."""
        if self.path is None:
            return train_tokenizer(texts, self.vocab_size)
        return load_tokenizer(self.path)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2); it is deterministic.

    A small corpus may not have enough different pairs: then the vocabulary is smaller than asked.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _as_plain_encoder(tokenizer)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer.json; padding and truncation that it may ask for are switched off.

    Raises:
        DataError: if the file cannot be read, is not byte-level or has no document separator.
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
    separator_id(tokenizer)
    return _as_plain_encoder(tokenizer)


def separator_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document, the first of `SEPARATORS` that there is."""
    for token in SEPARATORS:
        if (found := tokenizer.token_to_id(token)) is not None:
            return found
    raise DataError(
        f"A tokenizer must have a document separator, one of {', '.join(SEPARATORS)}; this one "
        "has none. Add one to its special tokens."
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
