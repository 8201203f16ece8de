"""Checksums of blocks, so that a file of any size is verified as it is read, each block once by each process.

CRC-32 finds every flipped bit and every burst of up to 32 bits in a block, and misses any other damage once
in four thousand million times. It is against disks and copies, not against somebody who forges a file.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path

import numpy as np

BLOCK = 1 << 16  # bytes: small beside what a step reads, and its sum is small beside it
SUM = np.dtype("<u4")
WAY_OUT = "copy or tokenise it again (remove the folder if it is a cache), then resume with ckpt_path"


def count(size: int) -> int:
    """Sums of so many bytes."""
    return -(-size // BLOCK)


class Summing:
    """The sums of bytes that come in pieces."""

    def __init__(self) -> None:
        self._sums: list[int] = []
        self._sum = self._filled = 0

    def update(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            part, view = view[: BLOCK - self._filled], view[BLOCK - self._filled :]
            self._sum = zlib.crc32(part, self._sum)
            self._filled += len(part)
            if self._filled == BLOCK:
                self._close()

    def _close(self) -> None:
        self._sums.append(self._sum)
        self._sum = self._filled = 0

    def finish(self) -> bytes:
        """The sums, to be written behind the bytes."""
        if self._filled:
            self._close()
        return np.array(self._sums, SUM).tobytes()


class CheckedFile:
    """A memory-mapped file whose end holds the sums of the rest.

    Args:
        path: of a file of ``size`` bytes and their sums.
        sound: which blocks need no more checking; none when None.

    Attributes:
        sound: (blocks,) bool, which ones are checked.
        data: (size,) uint8; call `check` before reading from it.

    Raises:
        OSError, ValueError: there is no such file, or it is shorter.
    """

    def __init__(self, path: Path, size: int, sound: np.ndarray | None = None) -> None:
        self.path, self.whole = path, size + count(size) * SUM.itemsize
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), self.whole, access=mmap.ACCESS_READ)
        every = np.frombuffer(self._map, np.uint8)
        self.data, self._sums = every[:size], every[size:]
        self.sound = np.zeros(count(size), bool) if sound is None else sound

    def check(self, start: int, stop: int) -> None:
        """Raise a ValueError unless these bytes are those that were written."""
        if self._map.size() < self.whole:  # reading would end the process by SIGBUS
            raise ValueError(f"data.path: shard '{self.path}' was cut while it was read; {WAY_OUT}")
        for block in range(start // BLOCK, count(stop)):
            if not self.sound[block]:
                begin = block * BLOCK
                part = self.data[begin : begin + BLOCK]
                expected = self._sums[block * SUM.itemsize : (block + 1) * SUM.itemsize]
                if zlib.crc32(part).to_bytes(SUM.itemsize, "little") != expected.tobytes():
                    raise ValueError(
                        f"data.path: shard '{self.path}' is damaged in bytes {begin} to "
                        f"{begin + len(part) - 1}: their checksum differs; {WAY_OUT}"
                    )
                self.sound[block] = True
