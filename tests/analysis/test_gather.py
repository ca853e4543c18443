"""Frames that are gathered block by block are those of all blocks at once."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nerve.analysis import gather
from nerve.analysis.gather import Coded, encoded, frame_of

RNG = np.random.default_rng(0)


def block(n: int, texts: list[str | None]) -> pd.DataFrame:
    objects = np.empty(n, dtype=object)
    objects[:] = [np.arange(i % 3) for i in range(n)]
    return pd.DataFrame(
        {
            "whole": RNG.integers(0, 2**40, n),
            "short": RNG.integers(0, 9, n).astype(np.int16),
            "number": np.where(RNG.random(n) < 0.2, np.nan, RNG.random(n)),
            "text": pd.Series([texts[i] for i in RNG.integers(0, len(texts), n)], dtype=object),
            "list": objects,
        }
    )


def gathered(blocks: list[pd.DataFrame]) -> pd.DataFrame:
    return frame_of(
        (
            {
                name: Coded.of(values) if name == "text" else values.to_numpy()
                for name, values in each.items()
            }
            for each in blocks
        ),
        len(blocks),
    )


@pytest.mark.parametrize("sizes", [(5,), (3, 0, 4), (1, 200, 7), (0, 0, 3), (200, 1)])
def test_blocks_of_any_size_are_pandas_own_concatenation(sizes):
    """Also where the first blocks say nothing of how many rows will come."""
    blocks = [block(n, ["b", "a", None, f"only in {i}"]) for i, n in enumerate(sizes)]
    found, expected = gathered(blocks), pd.concat(blocks, ignore_index=True)
    assert list(found.columns) == list(expected.columns)
    for name in ("whole", "short", "number"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])
    assert [list(each) for each in found["list"]] == [list(each) for each in expected["list"]]
    texts = found["text"].astype(object).where(found["text"].notna(), None)
    assert list(texts) == list(expected["text"].where(expected["text"].notna(), None))
    assert list(found["text"].cat.categories) == sorted(expected["text"].dropna().unique())


@pytest.mark.parametrize(("n", "kind"), [(100, np.int8), (300, np.int16), (40_000, np.int32)])
def test_codes_are_as_short_as_the_texts_allow(n, kind):
    """Where they become too many in a later block, too."""
    texts = [f"{i:05d}" for i in RNG.permutation(n)]
    half = n // 2
    parts = [pd.Series(texts[:half]), pd.Series(texts[half:])]
    found = frame_of(({"text": Coded.of(part)} for part in parts), 2)["text"]
    assert found.cat.codes.dtype == kind
    assert list(found.astype(object)) == texts


def test_texts_of_arrow_come_by_their_numbers():
    """Other columns as they are; null is no text."""
    table = pa.table({"text": ["x", None, "x", "y"], "number": [1, 2, 3, 4]})
    frame = encoded(pa.concat_tables([table, table])).to_pandas()
    coded = Coded.of(frame["text"])
    assert list(coded.codes) == [0, -1, 0, 1] * 2
    assert coded.texts == ("x", "y")
    assert list(frame["number"]) == [1, 2, 3, 4] * 2


def test_what_is_repeated_is_numpys_repeat():
    values = pd.Series(["a", None, "b", "a"])
    counts = np.array([2, 1, 0, 3])
    found = Coded.of(values).repeat(counts).astype(object)
    assert [None if pd.isna(each) else each for each in found] == ["a", "a", None, *"aaa"]


def test_renumbering_goes_piece_by_piece(monkeypatch):
    monkeypatch.setattr(gather, "_AT_ONCE", 2)
    found = frame_of([{"text": Coded.of(pd.Series([*"cabca"]))}], 1)["text"]
    assert list(found) == [*"cabca"]
    assert list(found.cat.categories) == [*"abc"]
