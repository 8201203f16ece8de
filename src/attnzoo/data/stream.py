"""A split as one stream of tokens, whatever shards it lies in: read by position, closed to a circle."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path

import numpy as np

from .manifest import Manifest, Shard, check_sizes, read_manifest
from .shards import MappedShard
from .split import SPLITS

_MAPPED = 256  # shards at the same time: a map holds a file descriptor, and processes get about a thousand


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens.

    Attributes:
        tokens: (count,) int64.
        ends: (k,) int64, ascending: positions in `tokens` of those that close a document.
        extra: (k,) int64, text bytes of these documents beyond those of their tokens.
    """

    tokens: np.ndarray
    ends: np.ndarray
    extra: np.ndarray


def cut(
    tokens: np.ndarray, stops: np.ndarray, extra: np.ndarray, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The part of documents that stand one after the other, as the fields of a `Piece`."""
    first, last = np.searchsorted(stops, (start + 1, start + count + 1))
    return tokens[start : start + count], stops[first:last] - (start + 1), extra[first:last]


class TokenStream:
    """One split of a folder of shards. Files are mapped when they are first read from.

    Args:
        folder: of the shards.
        split: "train" or "val".
        manifest: of the folder; read from it when None.
    """

    def __init__(self, folder: Path, split: str, manifest: Manifest | None = None) -> None:
        manifest = manifest or read_manifest(folder)
        self.folder, self.split, self.dtype = folder, split, manifest.dtype
        self.shards: list[Shard] = manifest.shards[split]
        self.stops = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self._mapped: collections.OrderedDict[int, MappedShard] = collections.OrderedDict()
        self._sound: dict[int, np.ndarray] = {}  # what is verified of each shard, mapped now or not

    def __len__(self) -> int:
        return int(self.stops[-1]) if self.shards else 0

    def __reduce__(self):
        # A worker process maps the files again; pickled as arrays, the stream would travel as a copy.
        return TokenStream, (self.folder, self.split)

    def read(self, start: int, count: int) -> Piece:
        """`count` tokens from position `start` on, at most one circle; O(log shards + log documents).

        Raises:
            ValueError: they are damaged.
        """
        length = len(self)
        assert 0 <= start < length and 0 <= count <= length, (start, count, length)
        number = int(np.searchsorted(self.stops, start, side="right"))
        at = start - (int(self.stops[number - 1]) if number else 0)
        parts, done = [], 0
        while done < count:
            shard = self._map(number)
            part = shard.tokens(at, at + count - done)
            _, ends, more = cut(part, shard.stops, shard.extra, at, len(part))
            parts.append((part.astype(np.int64), ends + done, more.copy()))  # no view that would keep a map
            done, at, number = done + len(part), 0, (number + 1) % len(self.shards)
        tokens, ends, extra = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return Piece(tokens, ends, extra)

    def _map(self, number: int) -> MappedShard:
        found = self._mapped.pop(number, None)
        if found is None:
            if len(self._mapped) >= _MAPPED:
                self._mapped.popitem(last=False)
            found = MappedShard(self.folder, self.shards[number], self.dtype, self._sound.get(number))
            self._sound[number] = found.sound
        self._mapped[number] = found
        return found


def open_streams(folder: Path) -> tuple[Manifest, TokenStream, TokenStream]:
    """Manifest, training and validation stream of `folder`: one file read, one `stat` per shard.

    Raises:
        ValueError: no manifest, a bad one, or a shard that is missing or cut.
    """
    manifest = read_manifest(folder)
    for split in SPLITS:
        check_sizes(folder, manifest.shards[split], manifest.dtype)
    train, val = (TokenStream(folder, split, manifest) for split in SPLITS)
    return manifest, train, val
