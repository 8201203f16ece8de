"""Text to a folder of shards: a source of any size, read once, in several processes, resumable.

The source's documents are tokenised by whichever process is free and written in their own order, so the
bytes do not depend on the number of processes. A training shard is full with the document that brings it to
`shard_tokens`; what was held out meanwhile becomes the validation shard of the same number. Then a line of
the journal says how far the source is read, and a later call goes on from there.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.train.guard import RunFailed
from attnzoo.train.store import write_atomic

from .config import TEXT_SOURCES, DataConfig, TokenizerConfig
from .corpora import source_key, texts_of
from .encoding import PIECE, encode_documents, gathered, start_of
from .journal import JOURNAL, Done, add_to_journal, begin_journal, check_plan, read_journal
from .manifest import (
    MANIFEST,
    Manifest,
    Shard,
    check_sizes,
    damaged,
    dtype_for,
    key_of,
    read_manifest,
    shard_name,
)
from .shards import ShardWriter
from .split import SPLITS, digest, is_held_out
from .tokenizer import Tokenizer, load_tokenizer, ready_tokenizer, train_bpe

_OWN = (JOURNAL, MANIFEST, "tokenizer", ".lock")
Document = tuple[bytes, np.ndarray, int]  # digest, ids with the end token, text bytes beyond those of the ids


def tokenize(
    folder: Path,
    cfg: DataConfig,
    vocabulary: TokenizerConfig,
    shard_tokens: int,
    processes: int = 1,
    report: Callable[[Shard], Any] = lambda shard: None,
) -> Manifest:
    """Write what `data=tokens data.path=FOLDER` reads; finished shards of an earlier call are kept.

    Args:
        report: called with every shard that this call finishes.

    Raises:
        ValueError: nothing usable in the source, or the folder holds something else or cannot be written.
        RunFailed: a process died; what is finished stays.
    """
    if getattr(cfg, "name", None) not in TEXT_SOURCES:  # a task or a mixture has none
        raise ValueError(
            f"data: must be one of {', '.join(TEXT_SOURCES)}, got another; nothing else is tokenised"
        )
    plan = _plan(cfg, vocabulary, shard_tokens)
    with _writing(folder):
        if (folder / MANIFEST).exists():
            manifest = read_manifest(folder)
            check_plan(folder, manifest.plan, plan)
            return manifest
        begin_journal(folder, plan)
        tokenizer = _tokenizer(folder, cfg, vocabulary)
        dtype = dtype_for(tokenizer.vocab_size)
        done = read_journal(folder, dtype)
        documents = _documents(folder, cfg, tokenizer, done[-1].documents if done else 0, processes)
        for line in _write(folder, documents, dtype, shard_tokens, cfg.val_fraction, done):
            add_to_journal(folder, line)
            done.append(line)
            for shard in filter(None, (line.train, line.val)):
                report(shard)
        shards = {split: [s for s in (getattr(line, split) for line in done) if s] for split in SPLITS}
        _check_both(cfg, shards)
        known = f"tokens 1 {done[-1].chain} {cfg.val_fraction!r} {tokenizer.fingerprint}"
        fingerprint = hashlib.blake2b(known.encode(), digest_size=16).hexdigest()
        manifest = Manifest(fingerprint, dtype, shards, plan)
        write_atomic(folder / MANIFEST, lambda file: file.write(manifest.text().encode()))
        (folder / JOURNAL).unlink()
    return manifest


def check(folder: Path) -> list[str]:
    """Names of the damaged shards of `folder`; every file is read. Raises ValueError as opening it does."""
    manifest = read_manifest(folder)
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    check_sizes(folder, shards, manifest.dtype)
    return damaged(folder, shards)


def _plan(cfg: DataConfig, vocabulary: TokenizerConfig, shard_tokens: int) -> dict[str, Any]:
    ready = ready_tokenizer(vocabulary)
    return {
        "source": key_of(source_key(cfg)),
        "val_fraction": cfg.val_fraction,
        "tokenizer": ready.fingerprint if ready else f"{vocabulary.name} {vocabulary.vocab_size}",
        "shard_tokens": shard_tokens,
    }


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """The folder exists, is ours, and nobody else writes in it."""
    import filelock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in folder.iterdir() if p.name not in _OWN and not p.name.startswith(".")]
        if foreign and not any((folder / name).exists() for name in (JOURNAL, MANIFEST)):
            raise ValueError(f"out: '{folder}' holds other files, such as '{foreign[0]}'; give a new folder")
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout:
        raise ValueError(f"out: another process writes in '{folder}'; wait for it") from None
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out: '{folder}' cannot be written ({reason}); make room or give another folder, finished "
            "shards are kept"
        ) from None


def _tokenizer(folder: Path, cfg: DataConfig, vocabulary: TokenizerConfig) -> Tokenizer:
    """The one that the folder holds; made and saved first where it holds none."""
    place = folder / "tokenizer"
    if place.is_dir():
        return load_tokenizer(place)
    tokenizer = ready_tokenizer(vocabulary)
    if tokenizer is None:
        train = (text for text in texts_of(cfg) if not is_held_out(digest(text), cfg.val_fraction))
        tokenizer = train_bpe(start_of(train), vocabulary.vocab_size)
    fresh = folder / ".tokenizer"
    tokenizer.save(fresh)
    os.replace(fresh, place)
    return tokenizer


def _write(
    folder: Path,
    documents: Iterable[Document],
    dtype: np.dtype,
    shard_tokens: int,
    val_fraction: float,
    done: list[Done],
) -> Iterator[Done]:
    """Shard after shard, with the numbers that follow those of `done`."""
    read, chain = (done[-1].documents, bytes.fromhex(done[-1].chain)) if done else (0, b"")
    number, writers = len(done), {}
    try:
        for key, ids, extra in documents:
            if not writers:
                writers = {split: ShardWriter(folder / shard_name(split, number), dtype) for split in SPLITS}
            writers["val" if is_held_out(key, val_fraction) else "train"].add(ids, extra)
            read, chain = read + 1, hashlib.blake2b(chain + key, digest_size=16).digest()
            if writers["train"].tokens >= shard_tokens:
                yield Done(read, chain.hex(), **{split: writers[split].close() for split in SPLITS})
                number, writers = number + 1, {}
        if writers:
            yield Done(read, chain.hex(), **{split: writers[split].close() for split in SPLITS})
            writers = {}
    finally:
        for writer in writers.values():
            writer.discard()


def _check_both(cfg: DataConfig, shards: dict[str, list[Shard]]) -> None:
    if not any(shards.values()):
        raise ValueError(f"data.path: {cfg.path!r} holds no text; give files or rows that are not empty")
    for split, remedy in (("train", "lower"), ("val", "raise")):
        if not shards[split]:
            raise ValueError(
                f"data.val_fraction: leaves no document for {split}, got {cfg.val_fraction}; "
                f"{remedy} it or give more text"
            )


def _documents(
    folder: Path, cfg: DataConfig, tokenizer: Tokenizer, skip: int, processes: int
) -> Iterator[Document]:
    """The source's documents behind the first `skip`, tokenised, in order."""
    batches = gathered(islice(texts_of(cfg), skip, None), len, PIECE)
    if processes == 1:
        for batch in batches:
            yield from _encode(batch, tokenizer)
        return
    # spawned, because a process that has started threads must not be forked
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (folder / "tokenizer",)) as pool:
        waiting: collections.deque = collections.deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_encode, batch))
                if len(waiting) > 2 * processes:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool:
            raise RunFailed(
                "tokenize: a process died, perhaps for want of memory; run it again with fewer --processes, "
                "finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_own: Tokenizer | None = None  # of a process of the pool


def _begin(tokenizer: Path) -> None:
    global _own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _own = load_tokenizer(tokenizer)


def _encode(texts: list[str], tokenizer: Tokenizer | None = None) -> list[Document]:
    tokenizer = tokenizer or _own
    whole = encode_documents(texts, tokenizer, dtype_for(tokenizer.vocab_size))
    return [(digest(text), *document) for text, document in zip(texts, whole, strict=True)]
