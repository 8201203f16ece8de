"""Damaged files are refused or built again, wherever the damage is; none is used."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from attnzoo.data import build_data, cache
from attnzoo.data.checksums import BLOCK
from attnzoo.data.shards import MappedShard, ShardWriter
from attnzoo.train.checkpoint import find_checkpoint, read_checkpoint
from runs import train, write_text


def flipped(data: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("with_sum", [True, False])
def test_no_flipped_or_cut_checkpoint_is_read(tmp_path: Path, with_sum: bool) -> None:
    train(tmp_path, "trainer.max_steps=1")
    file = find_checkpoint(tmp_path / "run")
    whole, read = file.read_bytes(), read_checkpoint(file)
    if not with_sum:
        file.with_name(file.name + ".sha256").unlink()
    draw, silent = random.Random(0), []
    edges = [0, 1, 10, 40, len(whole) - 1, len(whole) - 20, len(whole) // 2]
    for at in [*edges, *(draw.randrange(len(whole)) for _ in range(150))]:
        file.write_bytes(flipped(whole, at, draw.randrange(8)))
        try:
            content = read_checkpoint(file)
        except ValueError as error:
            assert "ckpt_path: " in str(error) and "\n" not in str(error)
            continue
        same = all((content["model"][n] == v).all() for n, v in read["model"].items())
        silent.append(at) if with_sum or not same else None
    assert silent == []
    for size in (0, 1, len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="ckpt_path: "):
            read_checkpoint(file)


def data(folder: Path) -> dict:
    options = {"seq_len": 16, "val_fraction": 0.2, "cache_dir": str(folder / "cache")}
    return {"name": "text", "path": str(write_text(folder)), **options}


@pytest.mark.parametrize("large", [False, True])
def test_a_flipped_token_cache_is_not_trained_on(
    tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = data(tmp_path)
    first = build_data(values, {"name": "bytes"})
    known = first.sample(0)["tokens"].tolist()
    (shard,) = (tmp_path / "cache" / "tokens").glob("*/train-*.bin")
    del first
    whole = shard.read_bytes()
    if large:  # too large to be verified when it is opened
        monkeypatch.setattr(cache, "_VERIFIED", 0)
    shard.write_bytes(flipped(whole, 100, 3))
    again = build_data(values, {"name": "bytes"})
    if large:
        with pytest.raises(ValueError, match=r"data\.path: shard .* is damaged in bytes 0 to .* ckpt_path"):
            [again.sample(n) for n in range(50)]
    else:
        assert again.sample(0)["tokens"].tolist() == known and shard.read_bytes() == whole


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, object, np.dtype]:
    dtype = np.dtype("<u2")
    writer = ShardWriter(tmp_path / "train-00000.bin", dtype)
    for i in range(4):
        writer.add(np.arange(BLOCK // 4) + i, 0)
    return tmp_path, writer.close(), dtype


def test_a_shard_is_verified_block_by_block(shard: tuple) -> None:
    folder, entry, dtype = shard
    file = folder / entry.name
    whole, half = file.read_bytes(), BLOCK // 2
    file.write_bytes(flipped(whole, BLOCK + 5, 0))  # the second block of tokens
    mapped = MappedShard(folder, entry, dtype)
    assert len(mapped.tokens(0, half)) == half
    with pytest.raises(ValueError, match=f"bytes {BLOCK} to {2 * BLOCK - 1}"):
        mapped.tokens(half - 1, half + 1)
    for at in (entry.index_at(dtype), entry.content(dtype) - 1):  # the index, whichever tokens are read
        file.write_bytes(flipped(whole, at, 0))
        with pytest.raises(ValueError, match=r"data\.path: shard"):
            MappedShard(folder, entry, dtype)
    draw = random.Random(0)
    for _ in range(200):
        file.write_bytes(flipped(whole, draw.randrange(len(whole)), draw.randrange(8)))
        with pytest.raises(ValueError, match=r"data\.path: shard"):
            MappedShard(folder, entry, dtype).tokens(0, 2 * half)


def test_a_shard_that_is_cut_while_it_is_mapped_is_no_crash(shard: tuple) -> None:
    folder, entry, dtype = shard
    mapped = MappedShard(folder, entry, dtype)
    with open(folder / entry.name, "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="was cut while it was read"):
        mapped.tokens(0, 10)
