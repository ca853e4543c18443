"""Small corpora that tests build in memory."""

import random
from collections.abc import Callable, Iterable

import pytest

from nerve.data.corpus import Corpus, Document


@pytest.fixture(scope="session")
def make_corpus() -> Callable[[Iterable[str]], Corpus]:
    """Makes a corpus from texts."""

    def make(texts: Iterable[str]) -> Corpus:
        documents = [Document(f"{i}.txt", text) for i, text in enumerate(texts)]
        return Corpus("small", lambda: documents)

    return make


@pytest.fixture(scope="session")
def small_texts() -> list[str]:
    """40 texts of about 450 bytes: words from a small vocabulary, some of them not ASCII."""
    rng = random.Random(0)
    words = ["the", "rank", "of", "a", "matrix", "naïve", "Größe", "λ₁", "≥", "0", "\n", "def", "x"]
    return [" ".join(rng.choices(words, k=100)) for _ in range(40)]


@pytest.fixture(scope="session")
def small_corpus(make_corpus, small_texts) -> Corpus:
    """`small_texts` as a corpus."""
    return make_corpus(small_texts)
