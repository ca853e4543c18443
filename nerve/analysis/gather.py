"""Rows of many runs as one frame, in which each value is in memory once.

Ten thousand runs have some ten million rows. A frame that is made of frames is there twice before
these go, and a text of 16 letters in each row is as much as two numbers: so rows are gathered block
by block and column by column, and a column of texts holds their numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

_ROOM = 1.02
"""How much more room a column takes than its rows so far make likely. What is not written to costs
no memory."""

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Coded:
    """Texts by their numbers: `texts[code]`; a code of -1 is no text."""

    codes: np.ndarray
    texts: tuple[str, ...]

    @classmethod
    def of(cls, values: pd.Series) -> "Coded":
        """Those of a column."""
        if isinstance(values.dtype, pd.CategoricalDtype):
            return cls(values.cat.codes.to_numpy(), tuple(values.cat.categories))
        codes, texts = pd.factorize(values)
        return cls(codes, tuple(texts))

    def repeat(self, counts: np.ndarray) -> pd.Categorical:
        """Each as often as `counts` says."""
        return _categorical(self.codes.repeat(counts), self.texts)


Block = Mapping[str, np.ndarray | Coded]
"""Columns of equal length, all blocks having the same."""


def frame_of(blocks: Iterable[Block], n_blocks: int) -> pd.DataFrame:
    """One frame of all blocks, texts as categories in alphabetical order.

    Args:
        blocks: at least one.
        n_blocks: how many; it decides how much room is taken at the start, nothing else.
    """
    columns: dict[str, _Column] = {}
    for done, block in enumerate(blocks):
        for name, values in block.items():
            if name not in columns:
                columns[name] = _Column(values)
            columns[name].append(values, n_blocks / (done + 1))
    # A dictionary is copied into blocks of one kind, unless it is told not to be.
    return pd.DataFrame({name: own.finished() for name, own in columns.items()}, copy=False)


def encoded(table: pa.Table) -> pa.Table:
    """`table` with its texts by their numbers, as pandas takes them over."""
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(i, field.name, table.column(i).dictionary_encode())
    return table


class _Column:
    """An array that grows, in which what is not filled yet takes no memory of the machine.

    Args:
        first: values of its kind; they are not put in.
    """

    def __init__(self, first: np.ndarray | Coded) -> None:
        self._numbers: dict[str, int] | None = {} if isinstance(first, Coded) else None
        self._values = np.empty(0, np.int8 if isinstance(first, Coded) else first.dtype)
        self._n = 0

    def append(self, values: np.ndarray | Coded, share: float) -> None:
        """Puts `values` behind the others; all rows are taken to be `share` times those so far."""
        own = self._own_codes(values) if isinstance(values, Coded) else values
        end = self._n + len(own)
        if own.dtype != self._values.dtype:  # the codes of more texts are longer numbers
            self._values = self._values.astype(np.result_type(own, self._values))
        if end > len(self._values):
            grown = np.empty(max(end, int(_ROOM * share * end)), self._values.dtype)
            grown[: self._n] = self._values[: self._n]
            self._values = grown
        self._values[self._n : end] = own
        self._n = end

    def finished(self) -> np.ndarray | pd.Categorical:
        """What was put in."""
        values = self._values[: self._n]
        if self._numbers is None:
            return values
        ordered = sorted(self._numbers)
        places = {text: place for place, text in enumerate(ordered)}
        order = np.array([*(places[text] for text in self._numbers), -1], values.dtype)
        for start in range(0, len(values), _AT_ONCE):  # indices take eight bytes each meanwhile
            some = values[start : start + _AT_ONCE]
            some[:] = order[some]
        return _categorical(values, ordered)

    def _own_codes(self, values: Coded) -> np.ndarray:
        """By the numbers that texts have here, of the smallest kind that does."""
        numbers = self._numbers
        assert numbers is not None
        own = [numbers.setdefault(text, len(numbers)) for text in values.texts]
        kind = np.min_scalar_type(-len(numbers) - 1)
        return np.array([*own, -1], kind)[values.codes]


def _categorical(codes: np.ndarray, texts: Iterable[str]) -> pd.Categorical:
    dtype = pd.CategoricalDtype(pd.Index([*texts], dtype=object).astype("str"))
    return pd.Categorical.from_codes(codes, dtype=dtype, validate=False)
