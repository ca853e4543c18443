"""Token ids in a memory-mapped file, verified block by block when they are first used."""

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nerve.errors import DataError

BLOCK_BYTES = 1 << 16
"""Bytes per checksum: about as much as the system reads ahead for one window of tokens anyway."""


class TokenFile:
    """Token ids in a file; each block must match its checksum when it is first used.

    A file of many gigabytes opens immediately, and each byte is verified once, during the first
    epoch.

    Args:
        path: a file of raw little-endian ids.
        dtype: the dtype of the ids.
        checksums: CRC-32 of each block of `BLOCK_BYTES`, uint32 `[n_blocks]`.
    """

    def __init__(self, path: Path, dtype: str, checksums: np.ndarray) -> None:
        self.path = path
        self._ids = np.memmap(path, dtype=dtype, mode="r")
        self._bytes = self._ids.view(np.uint8).data
        self._checksums = checksums
        self._is_checked = np.zeros(len(checksums), dtype=bool)

    def __len__(self) -> int:
        return len(self._ids)

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The `length` ids that begin at each of `starts`, int64 `[len(starts), length]`.

        Raises:
            DataError: if the file differs from what was written.
        """
        size = self._ids.itemsize
        first = starts * size // BLOCK_BYTES
        last = ((starts + length) * size - 1) // BLOCK_BYTES
        spanned = first[:, None] + np.arange(np.max(last - first) + 1)
        self._require_written(np.minimum(spanned, last[:, None]))
        return self._ids[starts[:, None] + np.arange(length)].astype(np.int64)

    def all(self) -> np.ndarray:
        """All ids, as a read-only memory map.

        Raises:
            DataError: if the file differs from what was written.
        """
        self._require_written(np.arange(len(self._checksums)))
        return self._ids

    def _require_written(self, blocks: np.ndarray) -> None:
        for block in np.unique(blocks[~self._is_checked[blocks]]):
            found = zlib.crc32(self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
            if found != self._checksums[block]:
                _mark_as_changed(self.path)
                raise DataError(
                    f"A token cache must not change after it was built; block {block} of "
                    f"{self.path} (starting at byte {block * BLOCK_BYTES}) is not what was "
                    "written: the disk or another program changed it. Start again, which rebuilds "
                    "the cache."
                )
            self._is_checked[block] = True


def _mark_as_changed(path: Path) -> None:
    """Updates the time of a file, so that the next start verifies it completely."""
    try:
        os.utime(path)
    except OSError as error:  # for example, a file of another user
        raise DataError(
            f"A token cache must not change after it was built; {path} is not what was written, "
            f"and this user may not modify it ({error.strerror}). Remove the folder {path.parent}, "
            "or ask its owner to; the next start rebuilds it."
        ) from error


class Checksums:
    """Computes the CRC-32 of each block of the data as it is written."""

    def __init__(self) -> None:
        self._finished: list[int] = []
        self._crc = 0
        self._n_bytes = 0

    def update(self, data: bytes) -> None:
        """Appends `data`."""
        for piece in self._pieces(memoryview(data)):
            self._crc = zlib.crc32(piece, self._crc)
            self._n_bytes += len(piece)
            if self._n_bytes % BLOCK_BYTES == 0:
                self._finished.append(self._crc)
                self._crc = 0

    def of_blocks(self) -> np.ndarray:
        """Little-endian uint32 `[n_blocks]`; the last block may be shorter."""
        rest = [self._crc] if self._n_bytes % BLOCK_BYTES else []
        return np.array(self._finished + rest, dtype="<u4")

    def _pieces(self, data: memoryview) -> Iterator[memoryview]:
        start = 0
        while start < len(data):
            room = BLOCK_BYTES - self._n_bytes % BLOCK_BYTES
            yield data[start : start + room]
            start += room
