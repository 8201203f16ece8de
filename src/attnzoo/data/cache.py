"""Tokenised documents on disk: written once, complete or absent, and memory-mapped by every later run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .config import DataConfig, TokenizerConfig
from .corpora import load_documents, source_key
from .split import SPLITS, Split, digest, plan_split
from .tokenizer import Tokenizer, load_tokenizer, ready_tokenizer, train_bpe

if TYPE_CHECKING:
    import datasets

_FORMAT = 1  # part of the key: raise it whenever the bytes below or the way to them change
_MANIFEST = "manifest.json"
_PIECE = 1 << 20  # characters encoded at once: tokenizers need some hundred bytes of memory per token
_VOCABULARY_BYTES = 100_000_000  # of training text that a BPE is trained on: more hardly changes it


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """One split: its documents one after the other, each closed by the end token.

    Attributes:
        tokens: (N,) memory-mapped ids.
        starts: (documents + 1,) int64, where each document starts; the last one is N.
        extra: (documents,) int64, bytes of text less the bytes of its tokens: what a tokenizer's
            normalisation dropped (positive) or a leading blank of its own added (negative). Zero for bytes.
    """

    folder: Path
    split: str
    tokens: np.ndarray
    starts: np.ndarray
    extra: np.ndarray

    @classmethod
    def open(cls, folder: Path, split: str) -> TokenStream:
        """Maps the files of `split`; raises OSError or ValueError where one is missing or damaged."""
        dtype = json.loads((folder / _MANIFEST).read_text())["dtype"]
        tokens = np.memmap(folder / f"{split}.tokens.bin", dtype=dtype, mode="r")
        starts, extra = (np.load(folder / f"{split}.{name}.npy") for name in ("starts", "extra"))
        return cls(folder, split, tokens, starts, extra)

    def __reduce__(self):
        # A worker process maps the files again; pickled as an array, the stream would travel as a copy.
        return TokenStream.open, (self.folder, self.split)


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
    parts = [_FORMAT, source_key(cfg), cfg.val_fraction, tokenizer_cfg.name, chosen]
    key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
    folder = cache_root(cfg) / "tokens" / key
    found = _opened(folder)
    if found:
        return found
    with _writable(folder.parent):
        import filelock

        folder.parent.mkdir(parents=True, exist_ok=True)
        # Other processes wait for the one that builds: the ranks of a run start at the same moment.
        with filelock.FileLock(f"{folder}.lock"):
            found = _opened(folder)
            if not found:
                _replace(folder, lambda into: _build(into, cfg, tokenizer_cfg, tokenizer))
                found = _opened(folder)
                assert found, folder
    return found


def _opened(folder: Path) -> TokenCache | None:
    """The cache in `folder`, None where it is absent, incomplete or damaged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if any((folder / name).stat().st_size != size for name, size in manifest["files"].items()):
            return None
        streams = [TokenStream.open(folder, split) for split in SPLITS]
        return TokenCache(manifest["fingerprint"], load_tokenizer(folder / "tokenizer"), *streams)
    except (OSError, ValueError, KeyError, TypeError):
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
        tokenizer = train_bpe(_vocabulary_text(documents, split), tokenizer_cfg.vocab_size)
    tokenizer.save(folder / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    for name in SPLITS:
        _write_split(folder, name, _parts(documents, split, name), tokenizer, dtype)
    del documents
    shutil.rmtree(raw)
    content = hashlib.blake2b(b"%d" % _FORMAT, digest_size=16)
    for part in (*(key for key, _ in known), repr(cfg.val_fraction).encode(), tokenizer.fingerprint.encode()):
        content.update(part)
    files = [file for file in folder.rglob("*") if file.is_file()]
    manifest = {
        "fingerprint": content.hexdigest(),
        "dtype": dtype.name,
        "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _write_split(
    folder: Path, name: str, texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype
) -> None:
    lengths, extra = [], []
    length = missing = 0  # of the current document
    with open(folder / f"{name}.tokens.bin", "wb") as file:
        for batch in _batches(_pieces(texts)):
            for (piece, last), ids in zip(batch, tokenizer.encode_batch([p for p, _ in batch]), strict=True):
                file.write(ids.astype(dtype).tobytes())
                length += len(ids)
                missing += len(piece.encode()) - tokenizer.byte_length(ids)
                if last:
                    file.write(dtype.type(tokenizer.eos_id).tobytes())
                    lengths.append(length + 1)
                    extra.append(missing)
                    length = missing = 0
    if not lengths:
        raise ValueError("data.path: the text is too short to hold a part of it out; give more text")
    np.save(folder / f"{name}.starts.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(folder / f"{name}.extra.npy", np.array(extra, dtype=np.int64))


def _texts(documents: datasets.Dataset) -> Iterator[str]:
    for batch in documents.iter(batch_size=64):
        yield from batch["text"]


def _parts(documents: datasets.Dataset, split: Split, name: str) -> Iterator[str]:
    """The texts of one split."""
    return (part for text in _texts(documents) for owner, part in split.parts(text) if owner == name)


def _vocabulary_text(documents: datasets.Dataset, split: Split) -> Iterator[str]:
    """The training text that a vocabulary is learnt from."""
    room = _VOCABULARY_BYTES
    for piece, _ in _pieces(_parts(documents, split, "train")):
        yield piece
        room -= len(piece.encode())
        if room < 0:
            return


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece, is the document's last one): pieces of bounded length, cut behind a line where there is one."""
    for text in texts:
        at = 0
        while at < len(text):
            end = at + _PIECE
            if end < len(text):
                end = text.rfind("\n", at, end) + 1 or end
            yield text[at:end], end >= len(text)
            at = end


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces gathered to a few times the largest one: enough for a tokenizer's threads to share."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size > 4 * _PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
