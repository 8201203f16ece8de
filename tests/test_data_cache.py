"""The tokenised text on disk: read once, complete or built again, and named by its content."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from attnzoo.data import Corpus, build_data, cache

BYTES = {"name": "bytes"}
BPE = {"name": "bpe", "vocab_size": 300}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    for i in range(24):
        (place / f"{i:02}.txt").write_text(f"document {i}\n" * (1 + i % 5))
    return place


@pytest.fixture
def data(folder: Path) -> dict:
    caches = str(folder.parent / "cache")
    return {"name": "text", "path": str(folder), "seq_len": 16, "val_fraction": 0.2, "cache_dir": caches}


def texts_of(corpus: Corpus, split: str) -> str:
    stream = getattr(corpus, split)
    return corpus.tokenizer.decode(stream.read(0, len(stream)).tokens)


def forbid(*_):
    raise AssertionError("the source was read again")


def cache_folder(data: dict) -> Path:
    (folder,) = (entry for entry in Path(data["cache_dir"], "tokens").iterdir() if entry.is_dir())
    return folder


def test_a_known_corpus_is_not_read_again(data: dict, monkeypatch: pytest.MonkeyPatch):
    first = build_data(data, BPE)
    monkeypatch.setattr(cache, "load_documents", forbid)
    again = build_data({**data, "seq_len": 8, "isolate": True, "batch_size": 3}, BPE, seed=9)
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    with pytest.raises(AssertionError, match="read again"):
        build_data({**data, "val_fraction": 0.3}, BPE)


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest", "tokenizer"])
def test_a_damaged_cache_is_built_again(data: dict, damage: str, monkeypatch: pytest.MonkeyPatch):
    first = build_data(data, BYTES)
    train, fingerprint = texts_of(first, "train"), first.fingerprint
    del first  # nobody maps the files that are damaged now
    folder = cache_folder(data)
    if damage == "shorter":
        os.truncate(folder / "train-00000.bin", 100)
    elif damage == "gone":
        (folder / "val-00000.bin").unlink()
    else:
        file = folder / {"manifest": "manifest.json", "tokenizer": "tokenizer/attnzoo_tokenizer.json"}[damage]
        file.write_text("{")
    again = build_data(data, BYTES)
    assert again.fingerprint == fingerprint
    assert texts_of(again, "train") == train
    monkeypatch.setattr(cache, "load_documents", forbid)
    assert build_data(data, BYTES).fingerprint == fingerprint


def test_fingerprint_is_one_of_the_content(data: dict, folder: Path):
    first = build_data(data, BYTES).fingerprint
    (folder / "03.txt").touch()
    os.rename(folder, folder.parent / "moved")
    moved = {**data, "path": str(folder.parent / "moved")}
    assert build_data(moved, BYTES).fingerprint == first
    found = {
        first,
        build_data(moved, BPE).fingerprint,
        build_data({**moved, "val_fraction": 0.3}, BYTES).fingerprint,
    }
    (folder.parent / "moved" / "03.txt").write_text("changed")
    assert len(found | {build_data(moved, BYTES).fingerprint}) == 4


def test_only_one_builds(data: dict, monkeypatch: pytest.MonkeyPatch):
    """The ranks of a run find no cache at the same moment: one reads the source, the others wait for it."""
    read, load = [], cache.load_documents

    def slowly(*args):
        read.append(args)
        time.sleep(0.3)
        return load(*args)

    monkeypatch.setattr(cache, "load_documents", slowly)
    with ThreadPoolExecutor(3) as ranks:
        found = list(ranks.map(lambda seed: build_data(data, BYTES, seed).fingerprint, range(3)))
    assert len(set(found)) == len(read) == 1


def test_where_the_cache_is(data: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ATTNZOO_CACHE", raising=False)
    build_data({**data, "cache_dir": None}, BYTES)
    assert (tmp_path / "xdg" / "attnzoo" / "tokens").is_dir()
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "env"))
    build_data({**data, "cache_dir": None}, BYTES)
    assert (tmp_path / "env" / "tokens").is_dir()
