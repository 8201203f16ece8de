"""Split, cache, packing and sampler: which text a run sees, in which samples, whatever reads them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import normalizers, pre_tokenizers
from torch.utils.data import DataLoader

from attnzoo.data import Corpus, HFTokenizer, build_data, collate, targets
from attnzoo.data.split import plan_split
from attnzoo.data.stream import Piece
from attnzoo.data.tokenizer import train_bpe

BYTES = {"name": "bytes"}
BPE = {"name": "bpe", "vocab_size": 300}


def documents(count: int = 24, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    words = ["sample", "é", "東京", "grid", "of", "the", "stream", "\n", "🙂"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 40))) + f" {i}" for i in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "texts"
    place.mkdir()
    for i, text in enumerate(documents()):
        (place / f"{i:02}.txt").write_text(text, newline="")
    return place


@pytest.fixture
def data(folder: Path) -> dict:
    caches = str(folder.parent / "cache")
    return {"name": "text", "path": str(folder), "seq_len": 16, "val_fraction": 0.2, "cache_dir": caches}


def texts_of(corpus: Corpus, split: str) -> list[str]:
    """The documents of a split, decoded from its stream."""
    whole = everything(corpus, split)
    ends = np.flatnonzero(whole.tokens == corpus.tokenizer.eos_id)
    assert ends.tolist() == whole.ends.tolist()
    return [corpus.tokenizer.decode(part[:-1]) for part in np.split(whole.tokens, ends + 1)[:-1]]


def everything(corpus: Corpus, split: str) -> Piece:
    """All of a split."""
    stream = getattr(corpus, split)
    return stream.read(0, len(stream))


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_every_document_is_on_one_side(data: dict, tokenizer: dict):
    corpus = build_data(data, tokenizer)
    train, val = texts_of(corpus, "train"), texts_of(corpus, "val")
    assert sorted(train + val) == sorted(documents())
    share = sum(len(text.encode()) for text in val) / sum(len(text.encode()) for text in documents())
    assert 0.1 < share <= 0.2


def test_copies_stay_on_one_side(data: dict, folder: Path):
    for i, text in enumerate(documents()):
        (folder / f"copy{i}.txt").write_text(text, newline="")
    corpus = build_data(data, BYTES)
    assert not set(texts_of(corpus, "train")) & set(texts_of(corpus, "val"))
    assert set(Counter(texts_of(corpus, "val")).values()) == {2}


def test_a_single_document_gives_its_end(data: dict, folder: Path):
    text = "".join(f"line {i}\n" for i in range(100))
    (folder / "00.txt").write_text(text)
    corpus = build_data({**data, "path": str(folder / "00.txt")}, BYTES)
    ((train,), (val,)) = texts_of(corpus, "train"), texts_of(corpus, "val")
    assert train + val == text
    assert train.endswith("\n") and 0.1 < len(val) / len(text) <= 0.22


def test_split_leaves_something_on_both_sides():
    for sizes in ([1, 1], [1, 1000], [5, 900, 7, 2000]):
        keys = [bytes([i]) for i in range(len(sizes))]
        for fraction in (0.001, 0.5, 0.999):
            assert 0 < len(plan_split(zip(keys, sizes, strict=True), fraction).held_out) < len(sizes)


def test_bpe_knows_training_text_only(data: dict):
    corpus = build_data(data, BPE)
    train, val = texts_of(corpus, "train"), texts_of(corpus, "val")
    assert corpus.tokenizer.fingerprint == train_bpe(train, 300).fingerprint
    assert corpus.tokenizer.fingerprint != train_bpe(train + val, 300).fingerprint


def packed_by_hand(corpus: Corpus, split: str, start: int) -> tuple[list[int], list[int]]:
    """Tokens and document numbers of a sample, one token at a time."""
    stream = [
        (token, number)
        for number, text in enumerate(texts_of(corpus, split))
        for token in [*corpus.tokenizer.encode(text), corpus.tokenizer.eos_id]
    ]
    cut = [stream[(start + i) % len(stream)] for i in range(corpus.seq_len + 1)]
    segments = [1]
    for i in range(1, len(cut)):
        segments.append(segments[-1] + (cut[i][1] != cut[i - 1][1]))
    return [token for token, _ in cut], segments


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_samples_are_cut_as_by_hand(data: dict, tokenizer: dict, isolate: bool):
    corpus = build_data({**data, "isolate": isolate}, tokenizer, seed=3)
    crossed = 0
    for n in range(corpus.sampler.samples_per_epoch):
        sample = corpus.sample(n)
        tokens, segments = packed_by_hand(corpus, "train", corpus.sampler.start(n))
        assert sample["tokens"].tolist() == tokens and sample["counter"] == n
        assert sample["segment_ids"].tolist() == (segments if isolate else [1] * len(tokens))
        inputs, labels, ids = targets(sample)
        own = [not isolate or a == b for a, b in itertools.pairwise(segments)]
        wanted = [token if ok else -100 for token, ok in zip(tokens[1:], own, strict=True)]
        assert (inputs.tolist(), labels.tolist()) == (tokens[:-1], wanted)
        assert ids.tolist() == sample["segment_ids"][:-1].tolist()
        counted = corpus.tokenizer.byte_length([token for token in wanted if token != -100])
        assert sample["target_bytes"] == counted
        crossed += max(segments) - 1
    assert crossed > 10


def test_targets_leave_padding_out():
    sample = {"tokens": torch.tensor([[5, 6, 7, 8]]), "segment_ids": torch.tensor([[1, 1, 0, 0]])}
    assert targets(sample)[1].tolist() == [[6, -100, -100]]


@pytest.mark.parametrize("normalise", [False, True])
def test_an_epoch_counts_every_byte_once(data: dict, folder: Path, tmp_path: Path, normalise: bool):
    """Also where tokens and text differ in length, by a normalisation or a blank that the tokenizer adds."""
    tokenizer = BPE
    if normalise:
        backend = build_data(data, BPE).tokenizer.backend
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        HFTokenizer(backend).save(tmp_path / "tokenizer")
        tokenizer = {"name": "saved", "path": str(tmp_path / "tokenizer")}
    raw = [*documents(), "e\u0301" * 4]  # which NFC makes shorter
    (folder / "zz.txt").write_text(raw[-1])
    length = len(build_data(data, tokenizer).train)
    seq_len = next(t for t in range(2, length) if length % t == 0)  # an epoch leaves no remainder
    corpus = build_data({**data, "seq_len": seq_len}, tokenizer)
    counted = sum(corpus.sample(n)["target_bytes"].item() for n in range(length // seq_len))
    train = texts_of(corpus, "train")
    known = [text for text in raw if corpus.tokenizer.decode(corpus.tokenizer.encode(text)) in train]
    assert len(known) == len(train) and raw[-1] in known
    assert counted == sum(len(text.encode()) for text in known)


PROGRAM = """
import json, sys
from attnzoo.data import build_data
corpus = build_data(json.loads(sys.argv[1]), {"name": "bytes"}, seed=4)
print(json.dumps({n: corpus.sample(n)["tokens"].tolist() for n in json.loads(sys.argv[2])}, sort_keys=True))
"""


def test_processes_agree(data: dict):
    """Two processes that build the corpus at once and read it in other orders get the samples of this one."""
    corpus = build_data(data, BYTES, seed=4)
    wanted = {str(n): corpus.sample(n)["tokens"].tolist() for n in (700, 41, 0)}
    (built,) = (entry for entry in Path(data["cache_dir"], "tokens").iterdir() if entry.is_dir())
    os.rename(built, built.parent / f".{built.name}-killed")  # what a builder that was killed leaves behind
    processes = []
    for order in ([0, 41, 700], [41, 700, 0]):
        env = {**os.environ, "PYTHONHASHSEED": str(order[0]), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", PROGRAM, json.dumps(data), json.dumps(order)]
        processes.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    assert [json.loads(process.communicate()[0]) for process in processes] == [wanted] * 2
    assert [entry.name for entry in built.parent.iterdir() if entry.is_dir()] == [built.name]


@pytest.mark.parametrize(("batch_size", "num_workers", "ranks"), [(3, 0, 1), (4, 2, 1), (2, 0, 3)])
def test_batches_follow_the_counter(data: dict, batch_size: int, num_workers: int, ranks: int):
    """Whatever the batch size, the loader's processes and the ranks, each step reads the same counters."""
    corpus = build_data(data, BYTES, seed=4)
    stream = corpus.train_dataset(start=12, total=36)
    loaders = [
        DataLoader(
            stream,
            batch_size,
            sampler=range(rank, len(stream), ranks),
            num_workers=num_workers,
            collate_fn=collate,
        )
        for rank in range(ranks)
    ]
    at = 12
    for batches in zip(*loaders, strict=True):
        counters = torch.cat([batch["counter"] for batch in batches]).tolist()
        assert sorted(counters) == list(range(at, at + ranks * batch_size))
        for batch in batches:
            for n, tokens in zip(batch["counter"].tolist(), batch["tokens"], strict=True):
                assert torch.equal(tokens, corpus.sample(n)["tokens"])
        at += ranks * batch_size
    assert at == 36


def test_a_corpus_travels_to_workers_without_its_text(data: dict):
    corpus = build_data(data, BPE, seed=4)
    assert len(pickle.dumps(corpus.train)) < 500
    assert torch.equal(pickle.loads(pickle.dumps(corpus)).sample(7)["tokens"], corpus.sample(7)["tokens"])


def test_held_out_set_is_fixed(data: dict):
    sets = [list(build_data({**data, "val_samples": 3}, BYTES, seed).validation()) for seed in (1, 2)]
    assert [len(samples) for samples in sets] == [3, 3]
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(*sets, strict=True))
    whole = build_data({**data, "val_samples": None}, BYTES)
    cuts = [sample["tokens"][:-1] for sample in whole.validation()]
    assert torch.cat(cuts).tolist() == everything(whole, "val").tokens[: 16 * len(cuts)].tolist()
    assert len(cuts) == (len(whole.val) - 1) // 16
