import zlib

import numpy as np
import pytest

from nerve.data.token_file import BLOCK_BYTES, Checksums, TokenFile
from nerve.errors import DataError

N_TOKENS = 3 * BLOCK_BYTES // 2 + 100  # of two bytes: three blocks and a part
IDS = (np.arange(N_TOKENS) * 7919 % 50_000).astype("<u2")


def checksums_of(*pieces: bytes) -> np.ndarray:
    checksums = Checksums()
    for piece in pieces:
        checksums.update(piece)
    return checksums.of_blocks()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "ids"
    path.write_bytes(IDS.tobytes())
    return path


@pytest.fixture
def tokens(path):
    return TokenFile(path, "<u2", checksums_of(IDS.tobytes()))


def damage(path, block: int) -> None:
    data = bytearray(path.read_bytes())
    data[block * BLOCK_BYTES + 5] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("cuts", [[], [1], [BLOCK_BYTES], [5, BLOCK_BYTES + 5, 3 * BLOCK_BYTES]])
def test_checksums_are_those_of_the_blocks_however_the_bytes_come(cuts):
    data = IDS.tobytes()
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    blocks = range(0, len(data), BLOCK_BYTES)
    assert [*checksums_of(*pieces)] == [zlib.crc32(data[at : at + BLOCK_BYTES]) for at in blocks]


def test_windows_are_the_ids_from_each_start_also_across_blocks(tokens):
    starts = np.array([0, BLOCK_BYTES // 2 - 3, 5, N_TOKENS - 10])
    expected = np.stack([IDS[start : start + 10] for start in starts])
    windows = tokens.windows(starts, 10)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(windows, expected)
    np.testing.assert_array_equal(tokens.all(), IDS)


@pytest.mark.parametrize(
    ("block", "start"), [(0, 0), (1, BLOCK_BYTES // 2 - 9), (2, BLOCK_BYTES), (3, N_TOKENS - 10)]
)
def test_a_changed_block_is_refused_where_it_is_used_and_only_there(tokens, path, block, start):
    damage(path, block)
    elsewhere = np.array([(block + 2) % 4 * BLOCK_BYTES // 2])
    np.testing.assert_array_equal(tokens.windows(elsewhere, 10)[0], IDS[elsewhere[0] :][:10])
    with pytest.raises(DataError, match=rf"block {block} of .*ids .*is not what was written"):
        tokens.windows(np.array([elsewhere[0], start]), 10)
    with pytest.raises(DataError, match=f"block {block} "):
        tokens.all()


def test_a_block_is_checked_once(tokens, monkeypatch):
    tokens.windows(np.array([0, 100]), 10)
    monkeypatch.setattr(zlib, "crc32", None)
    np.testing.assert_array_equal(tokens.windows(np.array([100]), 10)[0], IDS[100:110])
    with pytest.raises(TypeError):  # of a block that was not
        tokens.windows(np.array([N_TOKENS - 10]), 10)
