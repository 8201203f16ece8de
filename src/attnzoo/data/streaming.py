"""A corpus that is read from a dataset as training goes, without a copy on this machine.

The training documents are one endless stream: epoch after epoch, the shards of each in a random order, their
rows in the order of the file. It is cut into samples, and every `window` samples are a block, within which
the order is random too. So sample n is a function of (source, seed, n): but to know what block b holds, all
before it must have been tokenised once, here or in an earlier run, which left bookmarks on disk.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .bookmarks import Bookmark, Bookmarks
from .cache import built, cache_root
from .config import DataConfig, TokenizerConfig
from .corpora import source_key
from .corpus import Sample, TrainStream
from .encoding import PIECE, encode_documents, gathered, start_of
from .manifest import FORMAT, MANIFEST, Manifest, dtype_for, key_of, shard_name
from .places import Place, Source, identity, pinned
from .sampler import permute
from .shards import ShardWriter
from .stream import Piece, TokenStream, cut, open_streams
from .text import ValidationSet, check_length, packed
from .tokenizer import Tokenizer, load_tokenizer, ready_tokenizer, train_bpe

_FORMAT = 1  # part of the fingerprint: raise it whenever other samples come out
Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, stops and extra, as in a shard


class StreamCorpus:
    """A `Corpus` that reads on from where it is, which is fast, or goes back to a bookmark, which is not.

    Args:
        source, tokenizer, fingerprint: what is read.
        seed: of the order.
        marks: file of the bookmarks.
        held_out: the validation text.
    """

    labelled: ClassVar[bool] = False

    def __init__(
        self,
        cfg: DataConfig,
        source: Source,
        tokenizer: Tokenizer,
        fingerprint: str,
        seed: int,
        marks: Path,
        held_out: TokenStream,
    ) -> None:
        check_length("validation", held_out, cfg.seq_len)
        self.cfg, self.source, self.tokenizer = cfg, source, tokenizer
        self.fingerprint, self.seed, self.marks, self.held_out = fingerprint, seed, marks, held_out
        self.pack = cfg.pack
        self._reader: _Reader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}

    def sample(self, n: int) -> Sample:
        """Training sample `n`, which counts from 0 over all epochs."""
        window, seq_len = self.cfg.window, self.cfg.seq_len
        block, i = divmod(n, window)
        pack, part = divmod(i, self.pack)
        key = f"{self.fingerprint} {self.seed} {block} window".encode()
        i = permute(pack, window // self.pack, key) * self.pack + part
        tokens, ends, extra = cut(*self._block(block), i * seq_len, seq_len + 1)
        return packed(Piece(tokens.astype(np.int64), ends, extra), self.tokenizer, self.cfg.isolate, n)

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""
        return TrainStream(self, start, total)

    def validation(self) -> ValidationSet:
        """Held-out samples from the first shards, the same for every seed."""
        cfg = self.cfg
        return ValidationSet(self.held_out, cfg.seq_len, cfg.val_samples, self.tokenizer, cfg.isolate)

    def _block(self, block: int) -> Block:
        reader = self._reader
        # a forked process shares its parent's open files, and where they are at
        if reader is None or reader.process != os.getpid() or not reader.reaches(block):
            marks = Bookmarks(self.marks)
            mark = marks.before(block)
            order = f"{self.fingerprint} {self.seed}"
            size = self.cfg.window * self.cfg.seq_len
            self._reader = reader = _Reader(self.source, self.tokenizer, order, size, marks, mark)
        return reader.block(block)


class _Reader:
    """Reads block after block, from a bookmark on; the last two blocks stay in memory.

    Args:
        order: names the order of the shards.
        size: tokens of a block, without the one more that its last sample needs as a target.
    """

    def __init__(
        self, source: Source, tokenizer: Tokenizer, order: str, size: int, marks: Bookmarks, mark: Bookmark
    ) -> None:
        self.process = os.getpid()
        self.tokenizer, self.size, self.marks = tokenizer, size, marks
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.documents = self._tokenised(source, order, mark)
        self.pending: collections.deque[tuple[Place, bytes, np.ndarray, int]] = collections.deque()
        self.used = mark.token  # of the first pending document
        self.next = mark.block
        self.blocks: dict[int, Block] = {}

    def reaches(self, block: int) -> bool:
        """Whether the block is in memory or still to come."""
        return block in self.blocks or block >= self.next

    def block(self, number: int) -> Block:
        """Tokens (size + 1,), stops and extra of a block."""
        while number not in self.blocks:
            self.blocks.pop(self.next - 2, None)
            self.blocks[self.next] = self._read()
            self.next += 1
            place, key, _, _ = self.pending[0]
            self.marks.add(Bookmark(self.next, place, self.used, key.hex()))
        return self.blocks[number]

    def _read(self) -> Block:
        held = sum(len(ids) for _, _, ids, _ in self.pending) - self.used
        while held <= self.size:
            self.pending.append(next(self.documents))
            held += len(self.pending[-1][2])
        tokens = np.concatenate([ids for _, _, ids, _ in self.pending])[self.used :][: self.size + 1]
        stops = np.cumsum([len(ids) for _, _, ids, _ in self.pending]) - self.used
        extra = np.array([more for _, _, _, more in self.pending])
        inside = stops <= self.size + 1
        self.used += self.size
        while self.used >= len(self.pending[0][2]):
            self.used -= len(self.pending.popleft()[2])
        return tokens, stops[inside], extra[inside]

    def _tokenised(
        self, source: Source, order: str, mark: Bookmark
    ) -> Iterator[tuple[Place, bytes, np.ndarray, int]]:
        found = source.endless(mark.place, order)
        for batch in gathered(found, lambda document: len(document[2]), min(PIECE, self.size)):
            if mark.key and batch[0][:2] != (mark.place, bytes.fromhex(mark.key)):
                raise ValueError(
                    f"data.path: '{source.cfg.path}' has changed since an earlier run read it (epoch "
                    f"{mark.place.epoch}, shard {mark.place.turn}, row {mark.place.row}), so its samples "
                    "cannot be read again; restore it, or begin a new run with another cache_dir"
                )
            mark = Bookmark()
            texts = [text for _, _, text in batch]
            encoded = encode_documents(texts, self.tokenizer, self.dtype)
            for (place, key, _), (ids, extra) in zip(batch, encoded, strict=True):
                yield place, key, ids, extra


def build_stream(cfg: DataConfig, vocabulary: TokenizerConfig, seed: int) -> StreamCorpus:
    """The corpus that a checked configuration describes; its held-out text is read first, or is in the cache.

    Raises:
        ValueError: a source that is missing, unreadable, without a fixed content, or too short.
    """
    cfg = pinned(cfg)
    source, ready = Source(cfg), ready_tokenizer(vocabulary)
    wanted = cfg.val_samples * cfg.seq_len + 1
    chosen = ready.fingerprint if ready else vocabulary.vocab_size
    key = key_of(_FORMAT, FORMAT, source_key(cfg), cfg.val_fraction, wanted, vocabulary.name, chosen)
    root = cache_root(cfg) / "streams"

    def build(folder: Path) -> None:
        texts = (text for text, held_out in source.once() if not held_out)
        tokenizer = ready or train_bpe(start_of(texts), vocabulary.vocab_size)
        tokenizer.save(folder / "tokenizer")
        _write_held_out(folder, source, tokenizer, wanted)

    def opened(folder: Path) -> tuple[str, Tokenizer, TokenStream] | None:
        try:
            manifest, _, val = open_streams(folder)
            return manifest.fingerprint, load_tokenizer(folder / "tokenizer"), val
        except (OSError, ValueError):
            return None

    first, tokenizer, held_out = built(root / key, opened, build)
    known = [_FORMAT, identity(cfg), cfg.val_fraction, cfg.window, tokenizer.fingerprint, first]
    fingerprint = key_of(*known)
    marks = root / f"{key_of(fingerprint, seed, cfg.seq_len)}.jsonl"
    return StreamCorpus(cfg, source, tokenizer, fingerprint, seed, marks, held_out)


def _write_held_out(folder: Path, source: Source, tokenizer: Tokenizer, wanted: int) -> None:
    """Writes the first held-out documents that have `wanted` tokens, or all there are."""
    dtype = dtype_for(tokenizer.vocab_size)
    writer = ShardWriter(folder / shard_name("val", 0), dtype)
    texts = (text for text, held_out in source.once() if held_out)
    for ids, extra in encode_documents(texts, tokenizer, dtype):
        writer.add(ids, extra)
        if writer.tokens >= wanted:
            break
    shard = writer.close()
    if shard is None:
        raise ValueError(
            f"data.val_fraction: leaves no document for validation, got {source.cfg.val_fraction}; raise it "
            "or give more rows"
        )
    first = key_of(next(source.once())[0])
    (folder / MANIFEST).write_text(Manifest(first, dtype, {"train": [], "val": [shard]}).text())
