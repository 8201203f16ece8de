"""For the tests of data at scale: texts, folders of shards, and what loaders serve."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from attnzoo.data import Corpus
from attnzoo.data.config import parse_data, parse_tokenizer
from attnzoo.data.manifest import Manifest
from attnzoo.data.tokenize import tokenize
from attnzoo.train.batches import CounterBatches, train_loader

BYTES = {"name": "bytes"}


def documents(count: int = 40, seed: int = 1) -> list[str]:
    """Distinct texts of very different lengths, with characters of several bytes."""
    draw = random.Random(seed)
    words = ["sample", "é", "東京", "grid", "of", "the", "stream", "\n", "🙂"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 40))) + f" {i}" for i in range(count)]


def write_texts(folder: Path, texts: list[str]) -> dict:
    """The data group of a folder with one file for each text."""
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(text, newline="")
    return {"name": "text", "path": str(folder), "val_fraction": 0.2}


def shards_of(
    out: Path, source: dict, shard_tokens: int = 300, tokenizer: dict = BYTES, **more: object
) -> Manifest:
    """Tokenise a source into `out`."""
    return tokenize(out, parse_data(source), parse_tokenizer(tokenizer), shard_tokens, **more)


def tokens_by_hand(out: Path, manifest: Manifest, split: str) -> list[int]:
    """All tokens of a split, read from the files as their format says."""
    width = {"uint16": 2, "uint32": 4}[manifest.dtype.name]
    found: list[int] = []
    for shard in manifest.shards[split]:
        raw = (out / shard.name).read_bytes()[: shard.tokens * width]
        found += np.frombuffer(raw, f"<u{width}").tolist()
    return found


def check_served(corpus: Corpus, start: int, steps: int, workers: tuple[int, ...] = (0, 1, 3)) -> None:
    """Loaders of 1, 2 and 4 ranks with any number of workers give each step the samples of its counters."""
    size = 8
    wanted = [corpus.sample(n)["tokens"][:-1] for n in range(start * size, (start + steps) * size)]
    for world, count in [(1, n) for n in workers] + [(2, 0), (2, workers[-1]), (4, workers[1])]:
        loaders = [
            train_loader(corpus, CounterBatches(start, start + steps, size, rank=rank, world=world), count)
            for rank in range(world)
        ]
        served = [torch.cat([batch["tokens"] for batch in step]) for step in zip(*loaders, strict=True)]
        assert torch.equal(torch.cat(served), torch.stack(wanted)), (world, count)
