"""Tokenised documents on disk, in shard files that `attnzoo.data.manifest` lists.

A shard holds whole documents, in order:

    tokens  (tokens,) uint16 or uint32, every document closed by the end token; zeros up to 8 bytes
    stops   (documents,) int64, the position behind each document's last token
    extra   (documents,) int64, bytes of text less the bytes of its tokens: what a tokenizer's normalisation
            dropped (positive) or a leading blank of its own added (negative); zero for bytes
    sums    (blocks,) uint32, CRC-32 of each block of 64 KiB of the above

all little-endian. A process verifies `stops` and `extra` when it first reads from a shard, and each block of
tokens when it first reads from that block.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

import numpy as np

from .checksums import WAY_OUT, CheckedFile, Summing
from .manifest import INDEX, Shard


class ShardWriter:
    """Writes one shard; the file takes its name, complete, when `close` is called.

    Args:
        path: of the finished file.
        dtype: of the tokens.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype = path, dtype
        self.tokens = 0
        self._stops: list[int] = []
        self._extra: list[int] = []
        self._digest, self._sums = hashlib.sha256(), Summing()
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115, closed by close or discard

    def add(self, ids: np.ndarray, extra: int | None = None) -> None:
        """Append tokens; with `extra` they end a document, the end token included."""
        self._write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        if extra is not None:
            self._stops.append(self.tokens)
            self._extra.append(extra)

    def close(self) -> Shard | None:
        """Finish the file and describe it; None, and no file, where no document was added."""
        shard = Shard(self.path.name, self.tokens, len(self._stops), "")
        if not self._stops:
            self.discard()
            return None
        self._write(bytes(shard.index_at(self.dtype) - self.tokens * self.dtype.itemsize))
        self._write(np.array(self._stops, INDEX).tobytes() + np.array(self._extra, INDEX).tobytes())
        self._write(self._sums.finish())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        return dataclasses.replace(shard, sha256=self._digest.hexdigest())

    def discard(self) -> None:
        """Give up what was written."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._sums.update(data)


class MappedShard:
    """A shard, memory-mapped and verified as it is read.

    Args:
        sound: of an earlier map of the same shard.

    Attributes:
        stops, extra: (documents,) int64.
        sound: which blocks are verified.

    Raises:
        ValueError: the file was cut or damaged since the folder was opened.
    """

    def __init__(self, folder: Path, shard: Shard, dtype: np.dtype, sound: np.ndarray | None = None) -> None:
        path, self._dtype = folder / shard.name, dtype
        try:
            self._file = CheckedFile(path, shard.content(dtype), sound)
        except (OSError, ValueError) as error:
            raise ValueError(f"data.path: shard '{path}' cannot be mapped ({error}); {WAY_OUT}") from None
        self.sound = self._file.sound
        self._file.check(shard.index_at(dtype), shard.content(dtype))
        self._tokens = self._file.data[: shard.tokens * dtype.itemsize].view(dtype)
        index = self._file.data[shard.index_at(dtype) :].view(INDEX)
        self.stops, self.extra = index[: shard.documents], index[shard.documents :]

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The tokens from ``start`` on, before ``stop``; raises ValueError where they are damaged."""
        stop = min(stop, len(self))
        self._file.check(start * self._dtype.itemsize, stop * self._dtype.itemsize)
        return self._tokens[start:stop]
