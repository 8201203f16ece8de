"""Tokenised documents on disk: written once, complete or absent, and memory-mapped by every later run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from .config import DataConfig, TokenizerConfig
from .corpora import load_documents, source_key
from .encoding import encoded, start_of
from .manifest import FORMAT, MANIFEST, Manifest, Shard, damaged, dtype_for, key_of, shard_name
from .shards import ShardWriter
from .split import SPLITS, Split, digest, plan_split
from .stream import TokenStream, open_streams
from .tokenizer import Tokenizer, load_tokenizer, ready_tokenizer, train_bpe

if TYPE_CHECKING:
    import datasets

T = TypeVar("T")
_FORMAT = 1  # part of the fingerprint: raise it whenever other tokens come out
_VERIFIED = 1 << 28  # bytes up to which a cache is verified whole when opened; a larger one as it is read


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """An opened cache folder."""

    fingerprint: str
    tokenizer: Tokenizer
    train: TokenStream
    val: TokenStream


def cache_root(cfg: DataConfig) -> Path:
    """`data.cache_dir`, or the environment's ATTNZOO_CACHE, or `attnzoo` in the user's cache directory."""
    chosen = cfg.cache_dir or os.environ.get("ATTNZOO_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "attnzoo"


def open_cache(cfg: DataConfig, tokenizer_cfg: TokenizerConfig) -> TokenCache:
    """The tokenised corpus, built first unless a complete one is there.

    The folder's name is a key of what went in, without reading it: the source's files with their sizes and
    times, the limits, the split, the tokenizer. The fingerprint inside is one of the content, equal across
    machines.

    Raises:
        ValueError: nothing usable in the source, or a cache directory that cannot be written.
    """
    tokenizer = ready_tokenizer(tokenizer_cfg)
    chosen = tokenizer.fingerprint if tokenizer else tokenizer_cfg.vocab_size
    parts = [_FORMAT, FORMAT, source_key(cfg), cfg.val_fraction, tokenizer_cfg.name, chosen]
    folder = cache_root(cfg) / "tokens" / key_of(*parts)
    return built(folder, _opened, lambda into: _build(into, cfg, tokenizer_cfg, tokenizer))


def built(folder: Path, opened: Callable[[Path], T | None], build: Callable[[Path], None]) -> T:
    """What `opened` finds in `folder`; where it finds None, `build` is called first, in one process only.

    Raises:
        ValueError: as `build` does, or the folder cannot be written.
    """
    found = opened(folder)
    if found:
        return found
    with _writable(folder.parent):
        import filelock

        folder.parent.mkdir(parents=True, exist_ok=True)
        # Other processes wait for the one that builds: the ranks of a run start at the same moment.
        with filelock.FileLock(f"{folder}.lock"):
            found = opened(folder)
            if not found:
                _replace(folder, build)
                found = opened(folder)
                assert found, folder
    return found


def _opened(folder: Path) -> TokenCache | None:
    """The cache in `folder`, None where it is absent, incomplete or damaged."""
    try:
        manifest, *streams = open_streams(folder)
        shards = [shard for split in SPLITS for shard in manifest.shards[split]]
        small = sum(shard.size(manifest.dtype) for shard in shards) <= _VERIFIED
        tokenizer = load_tokenizer(folder / "tokenizer")
        if tokenizer.fingerprint != manifest.plan["tokenizer"] or (small and damaged(folder, shards)):
            return None
        return TokenCache(manifest.fingerprint, tokenizer, *streams)
    except (OSError, ValueError, KeyError):
        return None


@contextlib.contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise ValueError(
            f"data.cache_dir: '{root}' cannot be written ({getattr(error, 'strerror', None) or error}); "
            "set data.cache_dir or ATTNZOO_CACHE to a directory with room"
        ) from None


def _replace(folder: Path, build: Callable[[Path], None]) -> None:
    """Puts what `build` writes in place of `folder`, in one step. The caller holds the folder's lock."""
    prefix = f".{folder.name}-"
    for abandoned in folder.parent.glob(f"{prefix}*"):  # by a builder that was killed: we hold its lock
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix, ignore_cleanup_errors=True) as scratch:
        fresh = Path(scratch, "fresh")
        fresh.mkdir()
        build(fresh)
        if folder.exists():
            os.replace(folder, Path(scratch, "damaged"))
        os.replace(fresh, folder)


def _build(
    folder: Path, cfg: DataConfig, tokenizer_cfg: TokenizerConfig, tokenizer: Tokenizer | None
) -> None:
    """Reads, splits and tokenises into `folder`; the manifest comes last."""
    raw = folder / "raw"
    documents = load_documents(cfg, raw)
    known = [(digest(text), len(text.encode())) for text in _texts(documents)]
    split = plan_split(known, cfg.val_fraction)
    if tokenizer is None:
        tokenizer = train_bpe(start_of(_parts(documents, split, "train")), tokenizer_cfg.vocab_size)
    tokenizer.save(folder / "tokenizer")
    dtype = dtype_for(tokenizer.vocab_size)
    shards = {
        name: [_write_split(folder, name, _parts(documents, split, name), tokenizer, dtype)]
        for name in SPLITS
    }
    del documents
    shutil.rmtree(raw)
    content = hashlib.blake2b(b"%d" % _FORMAT, digest_size=16)
    for part in (*(key for key, _ in known), repr(cfg.val_fraction).encode(), tokenizer.fingerprint.encode()):
        content.update(part)
    manifest = Manifest(content.hexdigest(), dtype, shards, {"tokenizer": tokenizer.fingerprint})
    (folder / MANIFEST).write_text(manifest.text())


def _write_split(
    folder: Path, name: str, texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype
) -> Shard:
    writer = ShardWriter(folder / shard_name(name, 0), dtype)
    for ids, extra in encoded(texts, tokenizer):
        writer.add(ids, extra)
    shard = writer.close()
    if shard is None:
        raise ValueError("data.path: the text is too short to hold a part of it out; give more text")
    return shard


def _texts(documents: datasets.Dataset) -> Iterator[str]:
    for batch in documents.iter(batch_size=64):
        yield from batch["text"]


def _parts(documents: datasets.Dataset, split: Split, name: str) -> Iterator[str]:
    """The texts of one split."""
    return (part for text in _texts(documents) for owner, part in split.parts(text) if owner == name)
