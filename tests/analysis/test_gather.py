"""Frames gathered block by block equal those of all blocks at once."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from nerve.analysis import gather
from nerve.analysis.gather import (
    Coded,
    Read,
    columns_of,
    frame_from_columns,
    gather_columns,
)

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


def gathered_frame(blocks: list[pd.DataFrame]) -> pd.DataFrame:
    columns = [
        {
            name: Coded.of(values) if name == "text" else values.to_numpy()
            for name, values in each.items()
        }
        for each in blocks
    ]
    times = [len(blocks) / (i + 1) for i in range(len(blocks))]
    return frame_from_columns(gather_columns(zip(columns, times, strict=True)))


@pytest.mark.parametrize("sizes", [(5,), (3, 0, 4), (1, 200, 7), (0, 0, 3), (200, 1)])
def test_gathered_blocks_of_any_size_equal_the_concatenation_of_pandas(sizes):
    """Also if the first blocks do not indicate how many rows will follow."""
    blocks = [block(n, ["b", "a", None, f"only in {i}"]) for i, n in enumerate(sizes)]
    found, expected = gathered_frame(blocks), pd.concat(blocks, ignore_index=True)
    assert list(found.columns) == list(expected.columns)
    for name in ("whole", "short", "number"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])
    assert [list(each) for each in found["list"]] == [list(each) for each in expected["list"]]
    texts = found["text"].astype(object).where(found["text"].notna(), None)
    assert list(texts) == list(expected["text"].where(expected["text"].notna(), None))
    assert list(found["text"].cat.categories) == sorted(expected["text"].dropna().unique())


@pytest.mark.parametrize(("n", "kind"), [(100, np.int8), (300, np.int16), (40_000, np.int32)])
def test_codes_have_the_smallest_sufficient_type(n, kind):
    """Also if a later block makes them too many."""
    texts = [f"{i:05d}" for i in RNG.permutation(n)]
    half = n // 2
    parts = [pd.Series(texts[:half]), pd.Series(texts[half:])]
    found = gather_columns(({"text": Coded.of(part)}, 1) for part in parts)["text"]
    assert found.codes.dtype == kind
    assert list(found) == texts


def test_columns_of_arrow_equal_the_conversion_of_pandas():
    """Strings by their codes, also if a later chunk has new ones; null becomes no string or NaN."""
    lists = pa.array([[1.0], [], [2.0, 3.0], [4.0]], pa.list_(pa.float32()))
    first, second = (
        pa.table(
            {"text": texts, "whole": [1, 2, 3, 4], "number": [0.5, None, -0.0, 1.0], "l": lists}
        )
        for texts in (["x", None, "x", "y"], ["z", "y", None, "x"])
    )
    table = pa.concat_tables([first, first.slice(0, 0), second])
    found, expected = columns_of(table), table.to_pandas()
    coded = found["text"]
    assert isinstance(coded, Coded)
    assert list(coded.codes) == [0, -1, 0, 1, 2, 1, -1, 0]
    assert coded.texts == ("x", "y", "z")
    for name in ("whole", "number"):
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(found[name], expected[name])
    for own, each in zip(found["l"], expected["l"], strict=True):
        assert own.dtype == each.dtype
        np.testing.assert_array_equal(own, each)
    empty = columns_of(table.slice(0, 0))
    assert [len(empty["text"].codes), len(empty["number"])] == [0, 0]
    no_chunks = pa.table({"text": pa.chunked_array([], pa.string())})
    assert len(columns_of(no_chunks)["text"].codes) == 0


def test_a_frame_shares_memory_with_its_arrays():
    columns = {"text": Coded(np.array([2, 0, -1], np.int8), ("c", "a", "b")), "n": RNG.random(3)}
    frame = frame_from_columns(columns)
    assert list(frame["text"].astype(object).where(frame["text"].notna(), None)) == ["b", "c", None]
    assert np.shares_memory(frame["n"], columns["n"])


@pytest.mark.parametrize(
    ("run_bytes", "at_once"),
    [
        (300_000, [1, 2, 4, 8, 16, 27, 27]),  # blocks of 8 MiB
        (0, [1, 2, 4, 8, 16, 32, 64, 64]),  # such as groups, which few runs have
        (100 << 20, [1, 1, 1]),
    ],
)
def test_blocks_grow_until_they_have_their_size(run_bytes, at_once):
    found = [1]
    for n in at_once[:-1]:
        found.append(Read({}, n * run_bytes, [0] * n, []).next_at_once())
    assert found == at_once


def test_blocks_shrink_at_once_if_runs_are_larger():
    assert Read({}, 64 << 20, [0] * 64, []).next_at_once() == 8


def test_unused_strings_are_left_out():
    found = Coded.used(np.array([3, 0, -1, 3], np.int8), ("c", "a", "d", "b"))
    assert list(found.codes) == [1, 0, -1, 1]
    assert found.texts == ("c", "b")
    assert list(found.equal("b")) == [True, False, False, True]
    assert not found.equal("a").any()
    assert Coded.used(np.array([1, 0]), ("a", "b")).texts == ("a", "b")


def test_each_string_is_repeated_as_often_as_counted():
    """A string without rows is omitted."""
    found = Coded.repeated(["a", "b", "c"], [2, 0, 1])
    assert list(found.codes) == [0, 0, 1]
    assert found.texts == ("a", "c")
    assert Coded.repeated(["a"], [0]).texts == ()


def test_repeat_is_numpys():
    values = pd.Series(["a", None, "b", "a"])
    counts = np.array([2, 1, 0, 3])
    found = Coded.of(values).repeat(counts).categorical()
    assert [None if pd.isna(each) else each for each in found] == ["a", "a", None, *"aaa"]


def test_renumbering_goes_piece_by_piece(monkeypatch):
    monkeypatch.setattr(gather, "_CODES_AT_ONCE", 2)
    found = gather_columns([({"text": Coded.of(pd.Series([*"cabca"]))}, 1)])["text"]
    assert list(found) == [*"cabca"]
    assert list(found.categories) == [*"abc"]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux says what memory is")
def test_rows_are_in_memory_without_huge_pages():
    """NumPy marks other columns of that size for huge pages (`hg`)."""
    column = gather._Column(np.empty(0))
    column.append(np.arange(1e6), 1.0)
    values = column.finished()
    assert values.tolist() == list(range(10**6))
    assert "hg" not in flags_of_memory(values)
    assert flags_of_memory(values)


def flags_of_memory(values: np.ndarray) -> list[str]:
    """The flags of the memory mapping that contains the middle of an array."""
    middle = values.ctypes.data + values.nbytes // 2
    is_within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_within = int(match[1], 16) <= middle < int(match[2], 16)
        elif is_within and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
