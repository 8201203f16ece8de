"""`data=tokens`: the same samples however the text is cut into shards, opened by one file, damage named."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnzoo.cli import main
from attnzoo.data import build_data
from attnzoo.data.manifest import Manifest, read_manifest
from attnzoo.data.shards import ShardWriter
from attnzoo.data.stream import TokenStream
from attnzoo.data.tokenize import check
from data_parts import BYTES, check_served, documents, shards_of, tokens_by_hand, write_texts

EOS = 256


@pytest.fixture
def out(tmp_path: Path) -> Path:
    shards_of(tmp_path / "out", write_texts(tmp_path / "texts", documents()))
    return tmp_path / "out"


def data(out: Path, **more: Any) -> dict:
    return {"name": "tokens", "path": str(out), "seq_len": 16, **more}


def test_every_document_is_there_once_and_in_order(out: Path):
    manifest = read_manifest(out)
    assert min(len(manifest.shards["train"]), len(manifest.shards["val"])) > 3
    found = {}
    for split in ("train", "val"):
        raw = tokens_by_hand(out, manifest, split)
        ends = [i for i, token in enumerate(raw) if token == EOS]
        starts = [0, *(end + 1 for end in ends[:-1])]
        found[split] = [bytes(raw[a:b]).decode() for a, b in zip(starts, ends, strict=True)]
        assert len(raw) == ends[-1] + 1
        counts = [shard.documents for shard in manifest.shards[split]]
        assert sum(counts) == len(found[split])
    assert sorted(found["train"] + found["val"]) == sorted(documents())
    for split in found:
        assert found[split] == [text for text in documents() if text in found[split]]


@pytest.mark.parametrize("isolate", [False, True])
def test_samples_do_not_depend_on_the_shards(out: Path, tmp_path: Path, isolate: bool):
    manifest = shards_of(tmp_path / "whole", {**source_of(tmp_path)}, shard_tokens=10**9)
    assert len(manifest.shards["train"]) == 1
    many, whole = (build_data(data(f, isolate=isolate), BYTES, 3) for f in (out, tmp_path / "whole"))
    assert many.fingerprint == whole.fingerprint
    raw = tokens_by_hand(out, read_manifest(out), "train")
    for n in range(2 * many.sampler.samples_per_epoch):
        one, other = many.sample(n), whole.sample(n)
        assert all(torch.equal(one[key], other[key]) for key in one)
        start = many.sampler.start(n)
        cut = [raw[(start + i) % len(raw)] for i in range(17)]
        assert one["tokens"].tolist() == cut
        segments = [1 + (cut[:i].count(EOS) if isolate else 0) for i in range(17)]
        assert one["segment_ids"].tolist() == segments
        counted = [t for i, t in enumerate(cut) if i and segments[i] == segments[i - 1] and t != EOS]
        assert one["target_bytes"] == len(counted)
    for one, other in zip(many.validation(), whole.validation(), strict=True):
        assert torch.equal(one["tokens"], other["tokens"])


def source_of(tmp_path: Path) -> dict:
    return {"name": "text", "path": str(tmp_path / "texts"), "val_fraction": 0.2}


def test_loaders_serve_the_counters(out: Path):
    check_served(build_data(data(out), BYTES, 4), start=5, steps=4)


def test_an_epoch_reads_every_token_once(out: Path):
    length = len(tokens_by_hand(out, read_manifest(out), "train"))
    seq_len = next(t for t in range(2, length) if length % t == 0)  # an epoch leaves no remainder
    corpus = build_data(data(out, seq_len=seq_len), BYTES)
    epoch = [corpus.sample(n)["tokens"][:-1] for n in range(length // seq_len)]
    assert sorted(torch.cat(epoch).tolist()) == sorted(tokens_by_hand(out, read_manifest(out), "train"))
    counted = sum(corpus.sample(n)["target_bytes"].item() for n in range(length // seq_len))
    texts = bytes(t for t in tokens_by_hand(out, read_manifest(out), "train") if t != EOS)
    assert counted == len(texts)


_opened: list[str] = []
_counting = False
sys.addaudithook(lambda event, args: _opened.append(str(args[0])) if _counting and event == "open" else None)


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the files that are opened meanwhile."""
    global _counting
    _opened.clear()
    _counting = True
    try:
        yield _opened
    finally:
        _counting = False


def test_thousands_of_shards(out: Path, tmp_path: Path):
    """Opening reads manifest and tokenizer only; a sample opens its shard; descriptors do not run out."""
    count, big = 2000, tmp_path / "big"
    shutil.copytree(out / "tokenizer", big / "tokenizer")
    manifest = read_manifest(out)
    writer = ShardWriter(big / "train-00000.bin", manifest.dtype)
    shutil.copy(out / manifest.shards["val"][0].name, big)
    for i in range(3):
        writer.add(np.array([i, 65, 66, EOS]), 0)
    first = writer.close()
    names = [f"train-{i:05}.bin" for i in range(count)]
    for name in names[1:]:
        shutil.copyfile(big / first.name, big / name)
    train = [type(first)(name, first.tokens, first.documents, first.sha256) for name in names]
    shards = {"train": train, "val": manifest.shards["val"][:1]}
    (big / "manifest.json").write_text(Manifest("many", manifest.dtype, shards).text())
    with counted() as opened:
        corpus = build_data(data(big, seq_len=8), BYTES)
        assert len(opened) <= 8 and not any(name.endswith(".bin") for name in opened)
        corpus.sample(0)
        assert 1 <= sum(name.endswith(".bin") for name in opened) <= 2
        assert len(pickle.dumps(corpus.train)) < 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 300, hard))
    try:
        whole = corpus.train.read(0, len(corpus.train)).tokens
        assert whole.tolist() == [t for _ in range(count) for i in range(3) for t in (i, 65, 66, EOS)]
        for position in range(0, len(whole), 997):
            assert corpus.train.read(position, 3).tokens.tolist() == [
                whole[(position + i) % len(whole)] for i in range(3)
            ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resized(change: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, file.stat().st_size + change)


@pytest.mark.parametrize(
    ("damage", "words"),
    [(resized(-1), "bytes instead of"), (resized(8), "bytes instead of"), (Path.unlink, "is missing")],
    ids=["shorter", "longer", "gone"],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_shard_of_another_size_is_refused_at_opening(out: Path, split: str, damage: Callable, words: str):
    name = read_manifest(out).shards[split][2].name
    damage(out / name)
    with pytest.raises(
        ValueError, match=rf"data\.path: shard '.*{name}' .*{words}.*tokenise it again"
    ) as caught:
        build_data(data(out), BYTES)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_cut_after_opening_is_named(out: Path):
    stream = TokenStream(out, "train")
    os.truncate(out / "train-00000.bin", 10)
    with pytest.raises(ValueError, match=r"shard '.*train-00000\.bin' cannot be mapped"):
        stream.read(0, 5)


@pytest.mark.parametrize("where", [0, -1], ids=["tokens", "index"])
def test_a_flipped_bit_is_found_by_the_check(out: Path, where: int, capsys: pytest.CaptureFixture):
    assert check(out) == [] and main(["tokenize", str(out), "--check"]) == 0
    content = bytearray((out / "train-00003.bin").read_bytes())
    content[where] ^= 4
    (out / "train-00003.bin").write_bytes(content)
    build_data(data(out), BYTES)  # which compares sizes only, unless it reads there
    assert check(out) == ["train-00003.bin"]
    capsys.readouterr()
    assert main(["tokenize", str(out), "--check"]) == 1
    assert "damaged: train-00003.bin" in capsys.readouterr().err


def test_a_token_outside_the_vocabulary_is_refused(out: Path):
    manifest = read_manifest(out)
    writer = ShardWriter(out / "train-00000.bin", manifest.dtype)
    writer.add(np.array([65, 300, EOS]), 0)
    train = [writer.close(), *manifest.shards["train"][1:]]
    (out / "manifest.json").write_text(
        dataclasses.replace(manifest, shards={**manifest.shards, "train": train}).text()
    )
    corpus = build_data(data(out), BYTES)
    with pytest.raises(ValueError, match=r"token 300 is outside the vocabulary of 257.*--check"):
        [corpus.sample(n) for n in range(corpus.sampler.samples_per_epoch)]


def first_shard(**change: Any) -> Callable[[dict], None]:
    return lambda content: content["train"][0].update(change)


HOSTILE: dict[str, tuple[Callable[[dict], Any], str]] = {
    "parent folder": (first_shard(name="../train-00000.bin"), "name must be"),
    "absolute": (first_shard(name="/etc/train-00000.bin"), "name must be"),
    "line end": (first_shard(name="train-00000.bin\n"), "name must be"),
    "other split": (first_shard(name="val-00000.bin"), "name must be"),
    "no text": (first_shard(name=7), "name must be"),
    "twice": (lambda c: c["train"].append(c["train"][0]), "twice"),
    "negative tokens": (first_shard(tokens=-5), "tokens of"),
    "negative documents": (first_shard(documents=-1), "documents of"),
    "fewer tokens than documents": (first_shard(tokens=1, documents=2), "tokens of"),
    "half a token": (first_shard(tokens=10.5), "tokens of"),
    "true": (first_shard(documents=True), "documents of"),
    "huge": (first_shard(tokens=1 << 60), "tokens of"),
    "text for a number": (first_shard(tokens="9"), "tokens of"),
    "checksum": (first_shard(sha256="00"), "sha256 of"),
    "unknown entry": (first_shard(run="rm"), "TypeError"),
    "dtype": (lambda c: c.update(dtype="object"), "dtype must be"),
    "signed": (lambda c: c.update(dtype="int16"), "dtype must be"),
    "format": (lambda c: c.update(format=1), "format must be 3"),
    "no split": (lambda c: c.pop("val"), "KeyError"),
    "no list": (lambda c: c.update(train=3), "TypeError"),
    "fingerprint": (lambda c: c.update(fingerprint=3), "fingerprint must be"),
    "plan": (lambda c: c.update(plan=[]), "plan must be"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_manifest_is_refused(out: Path, case: str):
    change, words = HOSTILE[case]
    content = json.loads((out / "manifest.json").read_text())
    change(content)
    (out / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"data\.path: '.*manifest\.json' is no manifest.*{words}"
    ) as caught:
        build_data(data(out), BYTES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00"])
def test_a_manifest_that_is_none_is_refused(out: Path, text: str):
    (out / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.path: '.*manifest\.json' is no manifest"):
        build_data(data(out), BYTES)


def test_bad_paths_and_options(out: Path, tmp_path: Path):
    for given, words in (
        ({"path": str(tmp_path / "no")}, r"data\.path: no '.*manifest\.json'; give a folder"),
        ({"path": str(tmp_path / "texts")}, r"has not finished there"),
        ({"path": None}, r"data\.path: data=tokens needs one"),
        ({"path": ["a", "b"]}, r"data\.path: data=tokens takes a single folder"),
        ({"max_bytes": 5}, r"data\.max_bytes: data=tokens does not read it"),
        ({"val_fraction": 0.1}, r"data\.val_fraction: data=tokens does not read it"),
        ({"seq_len": 10**6}, r"data\.seq_len: must be under the \d+ tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            build_data({**data(out), **given}, BYTES)


def test_the_folder_has_its_tokenizer(tmp_path: Path):
    source = write_texts(tmp_path / "texts", documents())
    shards_of(tmp_path / "bpe", source, tokenizer={"name": "bpe", "vocab_size": 300})
    corpus = build_data(data(tmp_path / "bpe"), BYTES)
    assert 257 < corpus.tokenizer.vocab_size <= 300
    own = {"name": "saved", "path": str(tmp_path / "bpe" / "tokenizer")}
    assert build_data(data(tmp_path / "bpe"), own).fingerprint == corpus.fingerprint
    shards_of(tmp_path / "other", source, tokenizer={"name": "bpe", "vocab_size": 280})
    other = {"name": "saved", "path": str(tmp_path / "other" / "tokenizer")}
    with pytest.raises(ValueError, match=r"tokenizer\.path: .* was tokenised with another one"):
        build_data(data(tmp_path / "bpe"), other)
    with pytest.raises(ValueError, match=r"tokenizer: tokens has a vocabulary of its own, got 'bpe'"):
        build_data(data(tmp_path / "bpe"), {"name": "bpe", "vocab_size": 300})
