"""Byte-level BPE tokenizers, trained here or read from a tokenizer.json."""

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
"""Tokens that end a document, in order of preference; a tokenizer trained here has the first."""

N_BYTES = 256


@dataclass(frozen=True)
class TokenizerSpec:
    """The tokenizer of a corpus: either trained on it, or read from a file.

    Args:
        vocab_size: tokens of a tokenizer trained here, including the separator; at least 257.
        path: a tokenizer.json (of a byte-level model) to use instead.
        separator: the token that ends a document; None for the first of `SEPARATORS`.
        sample_bytes: the most text on which a tokenizer is trained.

    Raises:
        ConfigError: for values of the wrong type, or too small.
        DataError: for a file that does not exist.
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
        require(
            self.vocab_size > N_BYTES,
            f"data.vocab_size must be at least {N_BYTES + 1}, one token for each byte and the "
            f"document separator; got {self.vocab_size}.",
        )
        if self.path is not None and not self.path.is_file():
            raise DataError(
                f"A tokenizer must be a tokenizer.json; there is no file {str(self.path)!r}. "
                "Check the path, or omit it to train a tokenizer on the corpus."
            )

    @property
    def key(self) -> str:
        """Identifies the tokenizer in the key of the token cache.

        Raises:
            DataError: if its file cannot be read.
        """
        if self.path is None:
            return json.dumps(["bpe", self.vocab_size, self.sample_bytes, self.separator])
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"A tokenizer.json must be readable; {self.path} is not ({error.strerror}). Grant "
                "access, or save it again."
            ) from error
        return json.dumps(["file", hashlib.sha256(content).hexdigest(), self.separator])

    def build(self, texts: Iterable[str], n_bytes: int | None = None) -> Tokenizer:
        """Loads or trains the tokenizer; `texts`, of `n_bytes` in total, are only read to train."""
        if self.path is not None:
            return load_tokenizer(self.path, self.separator)
        with progress("training the tokenizer", n_bytes) as add:
            sample = _first_bytes(counted(texts, add), self.sample_bytes)
            return train_tokenizer(sample, self.vocab_size, self.separator or SEPARATORS[0])


def _first_bytes(texts: Iterable[str], n_bytes: int) -> Iterator[str]:
    """The first `n_bytes` of the texts; the last text is cut."""
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
    """Trains a byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2), deterministically.

    If a small corpus does not have enough different pairs, the vocabulary is smaller than
    requested.
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
    """Reads a tokenizer.json, and disables its padding and truncation.

    Raises:
        DataError: if the file cannot be read, is not byte-level, or does not have a document
            separator or the requested one.
    """
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises bare `Exception`
        raise DataError(
            f"A tokenizer.json must be readable by the package tokenizers; {path} is not: "
            f"{error}. Save the tokenizer again."
        ) from error
    if '"ByteLevel"' not in json.dumps(_specification(tokenizer)["decoder"]):
        raise DataError(
            f"A tokenizer must be byte-level (GPT-2, GPT-NeoX, Llama 3, Qwen), so that each token "
            f"represents a known number of bytes; {path} is not. Use a byte-level one, or omit it "
            "to train one on the corpus."
        )
    separator_of(tokenizer, separator)
    return _as_plain_encoder(tokenizer)


def separator_of(tokenizer: Tokenizer, wanted: str | None = None) -> str:
    """The token that ends a document: `wanted`, or the first of `SEPARATORS` in the vocabulary.

    Raises:
        DataError: if there is none, or if `wanted` is not a special token of this tokenizer.
    """
    special = [
        token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    there = ", ".join(special) or "none"
    if wanted is not None:
        if wanted not in special:
            raise DataError(
                f"data.separator_token must be a special token of the tokenizer ({there}); "
                f"got {wanted!r}. Choose one of them, or add it to the file."
            )
        return wanted
    for token in SEPARATORS:
        if tokenizer.token_to_id(token) is not None:
            return token
    raise DataError(
        f"A tokenizer must have a document separator, one of {', '.join(SEPARATORS)}; this one "
        f"has none. Set data.separator_token to the special token that ends a document "
        f"({there})."
    )


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest id: the number of rows that an embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each id represents, int64 `[vocab_size]`; 0 for special tokens.

    A byte-level vocabulary represents each byte by one printable character, so the length of an
    ordinary token's string is its number of bytes. Added tokens are stored as plain text.
    """
    lengths = np.zeros(vocab_size(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        lengths[index] = len(token)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        lengths[index] = 0 if added.special else len(added.content.encode())
    return lengths


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of everything that determines how a text is encoded, 16 hexadecimal digits."""
    specification = _specification(tokenizer)
    decisive = {
        key: specification[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]


def _specification(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def _as_plain_encoder(tokenizer: Tokenizer) -> Tokenizer:
    """Makes the tokenizer encode every character of a document as text: no truncation, no padding,
    no special tokens."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is ordinary text
    return tokenizer
