"""Batches for a language model: windows of a tokenized corpus."""

import hashlib
import logging
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nerve.config import require, require_type
from nerve.data.batches import Batch, BatchDataModule, BatchLoader, HeldOutBatches, ShuffledOrder
from nerve.data.cache import cached_tokens
from nerve.data.cache_entry import CacheMeta, TokenCache
from nerve.data.corpus import Corpus
from nerve.data.token_file import TokenFile
from nerve.data.tokenizer import TokenizerSpec, token_byte_lengths
from nerve.errors import DataError

log = logging.getLogger(__name__)


_LARGE_BYTES = 1 << 16


class TextDataModule(BatchDataModule):
    """Batches `(inputs, targets)`, both int64 `[batch, seq_len]`, targets one token later.

    The tokens of a split are one stream, cut into windows of seq_len + 1 tokens. Consecutive
    windows overlap by one token, so every token except the first is a target once per epoch. The
    held-out set consists of windows spread evenly over the validation stream; it depends on the
    corpus, the tokenizer, `seq_len`, `n_heldout_tokens` and `val_fraction`, but not on `seed`.

    `vocab_size` is available after `prepare_data()` and `setup()`, which may be called repeatedly.

    Args:
        corpus: the documents.
        seq_len: tokens per sequence.
        batch_size: sequences per micro-batch, over all processes.
        n_train_batches: length of the training loader.
        n_heldout_tokens: held-out target tokens, rounded up to whole sequences.
        seed: only determines the order of training.
        vocab_size: number of tokens of the byte-level BPE trained on the training split.
        tokenizer: a tokenizer.json to use instead.
        separator_token: the tokenizer's token that ends a document; None for the first one that it
            has of `<|endoftext|>` and similar tokens (`SEPARATORS`).
        tokenizer_sample_bytes: the most text of the training split on which a BPE is trained.
        val_fraction: share of the corpus's bytes used for validation, in whole documents.
        cache_dir: the folder of the token caches; None for NERVE_CACHE or the user's cache folder.

    Raises:
        ConfigError, DataError: for values out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seq_len: int,
        batch_size: int,
        n_train_batches: int,
        n_heldout_tokens: int,
        seed: int,
        vocab_size: int = 1024,
        tokenizer: str | Path | None = None,
        separator_token: str | None = None,
        tokenizer_sample_bytes: int = 1_000_000_000,
        val_fraction: float = 0.05,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, n_train_batches=n_train_batches, seed=seed)
        require_type("data.val_fraction", val_fraction, float)
        require(seq_len >= 1, f"data.seq_len must be at least 1; got {seq_len}.")
        require(
            n_heldout_tokens >= 1,
            f"monitor.n_tokens must be at least 1; got {n_heldout_tokens}.",
        )
        require(
            0 < val_fraction < 1,
            f"data.val_fraction must be above 0 and below 1; got {val_fraction}.",
        )
        self.corpus = corpus
        self.seq_len = seq_len
        self.n_heldout_sequences = math.ceil(n_heldout_tokens / seq_len)
        path = None if tokenizer is None else Path(tokenizer)
        self._spec = TokenizerSpec(vocab_size, path, separator_token, tokenizer_sample_bytes)
        self._val_fraction = val_fraction
        self._cache_dir = cache_dir
        self._cache: TokenCache | None = None

    def prepare_data(self) -> None:
        """Builds the token cache if there is none.

        Raises:
            DataError: if the corpus cannot be read, or has too few tokens for `seq_len` and
                `n_heldout_tokens`.
        """
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Opens the token cache, and builds it if `prepare_data` ran only on another machine."""
        if self._cache is not None:
            return
        cache = cached_tokens(self.corpus, self._spec, self._val_fraction, self._cache_dir)
        self._check_lengths(cache)
        _warn_of_large_document(cache.meta)
        self._cache = cache

    def train_dataloader(self) -> BatchLoader[Batch]:
        """`n_train_batches` shuffled batches; the loader's state resumes exactly."""
        return self._train_loader(self._fetch_train, self._order)

    def val_dataloader(self) -> HeldOutBatches[Batch]:
        """The held-out sequences, in the same batches each time; the last may be smaller."""
        return self._heldout_batches(self._fetch_heldout, self.n_heldout_sequences)

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding needs; for a small corpus, possibly fewer than requested."""
        return self._tokens.meta.vocab_size

    @property
    def separator_token(self) -> str:
        """The token that ends each document."""
        return self._tokens.meta.separator

    @property
    def n_heldout_tokens(self) -> int:
        """Target tokens of the held-out set."""
        return self.n_heldout_sequences * self.seq_len

    @property
    def n_heldout_targets(self) -> int:
        """Number of targets that the validation loss is averaged over: tokens."""
        return self.n_heldout_tokens

    @cached_property
    def n_heldout_bytes(self) -> int:
        """Bytes of text that the held-out targets represent; a document separator counts as 0.

        Bits per byte of text = loss · n_heldout_tokens / (ln 2 · n_heldout_bytes), with the loss
        in nats per token. Unlike the loss, it can be compared between tokenizers.
        """
        tokenizer = self._tokens.tokenizer
        lengths = token_byte_lengths(tokenizer)
        lengths[tokenizer.token_to_id(self.separator_token)] = 0
        return int(lengths[self._heldout_windows[:, 1:]].sum())

    @property
    def token_counts(self) -> Tensor:
        """How often each token id occurs in the training split, `[vocab_size]`."""
        return torch.from_numpy(self._tokens.train_counts)

    @cached_property
    def unigram_loss(self) -> float:
        """Loss of the training split's unigram distribution on the held-out targets, nats per
        token.

        One is added to each count (Laplace), so that the loss is finite. A model whose loss stays
        above it has learned nothing from context.
        """
        counts = self._tokens.train_counts + 1.0
        log_probabilities = np.log(counts) - np.log(counts.sum())
        return float(-log_probabilities[self._heldout_windows[:, 1:]].mean())

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hashes that must be equal for losses to be comparable: of corpus, tokenizer and held-out
        set."""
        heldout = hashlib.sha256(self._heldout_windows.astype("<i8").tobytes())
        heldout.update(str(self._heldout_windows.shape).encode())
        return {
            "corpus": self._tokens.meta.corpus_fingerprint,
            "tokenizer": self._tokens.meta.tokenizer_fingerprint,
            "heldout": heldout.hexdigest()[:16],
        }

    def describe(self) -> dict[str, int | float | str]:
        """Counts, for the log."""
        meta = self._tokens.meta
        n_train_windows = _n_windows(meta.n_train_tokens, self.seq_len)
        return {
            "corpus": self.corpus.name,
            "n_documents": meta.n_documents,
            "n_bytes": meta.n_bytes,
            "vocab_size": meta.vocab_size,
            "separator": meta.separator,
            "n_train_tokens": meta.n_train_tokens,
            "n_val_tokens": meta.n_val_tokens,
            "n_train_sequences": n_train_windows,
            "n_train_epochs": self.n_train_batches * self.batch_size / n_train_windows,
            "n_heldout_tokens": self.n_heldout_tokens,
            "n_heldout_bytes": self.n_heldout_bytes,
            "unigram_loss": self.unigram_loss,
        }

    @property
    def _tokens(self) -> TokenCache:
        if self._cache is None:
            raise DataError("The data must be set up first. Call setup().")
        return self._cache

    @cached_property
    def _order(self) -> ShuffledOrder:
        n_windows = _n_windows(len(self._tokens.train), self.seq_len)
        return ShuffledOrder(n_windows, self.batch_size, self.seed)

    @cached_property
    def _heldout_windows(self) -> np.ndarray:
        """Token ids, int64 `[n_heldout_sequences, seq_len + 1]`."""
        n_windows = _n_windows(len(self._tokens.val), self.seq_len)
        spread = np.arange(self.n_heldout_sequences) * n_windows // self.n_heldout_sequences
        return _windows(self._tokens.val, spread, self.seq_len)

    def _fetch_train(self, indices: np.ndarray) -> Batch:
        return _inputs_and_targets(_windows(self._tokens.train, indices, self.seq_len))

    def _fetch_heldout(self, indices: np.ndarray) -> Batch:
        return _inputs_and_targets(self._heldout_windows[indices])

    def _check_lengths(self, cache: TokenCache) -> None:
        for split, tokens in (("training", cache.train), ("validation", cache.val)):
            if len(tokens) < self.seq_len + 1:
                raise DataError(
                    f"The {split} split must contain at least one window of seq_len + 1 = "
                    f"{self.seq_len + 1} tokens; that of {self.corpus.name} has {len(tokens)}. "
                    "Lower model.seq_len, add text, or change data.val_fraction."
                )
        available = _n_windows(len(cache.val), self.seq_len) * self.seq_len
        if self.n_heldout_tokens > available:
            raise DataError(
                f"monitor.n_tokens must not exceed the validation split; got "
                f"{self.n_heldout_tokens} (whole sequences of {self.seq_len}), but that of "
                f"{self.corpus.name} has {available}. Lower monitor.n_tokens or raise "
                f"data.val_fraction (now {self._val_fraction})."
            )


def _warn_of_large_document(meta: CacheMeta) -> None:
    """Warns if a large document dominates the validation split; parts of a long text that was cut
    are smaller than `_LARGE_BYTES`."""
    if meta.largest_val_share > 0.5 and meta.largest_val_bytes > _LARGE_BYTES:
        log.warning(
            "one document makes up %.0f%% of the validation split, so the validation loss is "
            "mostly its own: %s of %s. Split it, set the separator of documents "
            "(data.corpus.separator), or raise data.val_fraction",
            100 * meta.largest_val_share,
            meta.largest_val_document,
            meta.corpus,
        )


def _n_windows(n_tokens: int, seq_len: int) -> int:
    return (n_tokens - 1) // seq_len


def _windows(tokens: TokenFile, indices: np.ndarray, seq_len: int) -> np.ndarray:
    """The windows `indices` of a stream, int64 `[len(indices), seq_len + 1]`."""
    return tokens.windows(indices * seq_len, seq_len + 1)


def _inputs_and_targets(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    inputs, targets = (np.ascontiguousarray(each) for each in (windows[:, :-1], windows[:, 1:]))
    return torch.from_numpy(inputs), torch.from_numpy(targets)
