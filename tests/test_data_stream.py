"""`data=stream`: what is read is a function of the counter, wherever one starts and whatever is on disk."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from attnzoo.data import build_data, streaming
from attnzoo.data.config import parse_data
from attnzoo.data.places import Source, pinned
from attnzoo.data.sampler import permute
from attnzoo.data.split import digest
from attnzoo.data.streaming import StreamCorpus
from data_parts import BYTES, check_served, documents

EOS, SEQ_LEN, WINDOW, SHARDS = 256, 8, 6, 5
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))


def rows() -> list[list[str]]:
    """The texts of each shard, empty ones among them."""
    draw = random.Random(3)
    texts = iter(documents(80, seed=2))
    return [
        [next(texts) if draw.random() < 0.9 else "" for _ in range(draw.randrange(3, 14))]
        for _ in range(SHARDS)
    ]


def write_shard(place: Path, number: int, texts: list[str], form: str) -> None:
    if form == "jsonl":
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))
        (place / f"{number}.jsonl").write_text(lines)
    else:
        table = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
        table.to_parquet(place / f"{number}.parquet")


@pytest.fixture(params=["jsonl", "parquet"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for number, texts in enumerate(rows()):
        write_shard(folder, number, texts, request.param)
    return folder


def build(place: Path, seed: int = 3, **more: Any) -> StreamCorpus:
    data = {"name": "stream", "path": str(place), "seq_len": SEQ_LEN, "window": WINDOW, "val_samples": 4}
    return build_data({**data, "val_fraction": 0.2, **more}, BYTES, seed)


def trained_on(text: str) -> bool:
    return bool(text) and int.from_bytes(digest(text)[:8], "little") / 2**64 >= 0.2


def epoch_by_hand(corpus: StreamCorpus, epoch: int) -> list[str]:
    """The training documents of an epoch, shard after shard."""
    key = f"{corpus.fingerprint} {corpus.seed} {epoch} shards".encode()
    order = [permute(turn, SHARDS, key) for turn in range(SHARDS)]
    return [text for number in order for text in rows()[number] if trained_on(text)]


def tokens_by_hand(corpus: StreamCorpus, epochs: int) -> list[int]:
    texts = [text for epoch in range(epochs) for text in epoch_by_hand(corpus, epoch)]
    return [token for text in texts for token in [*text.encode(), EOS]]


@pytest.mark.parametrize("isolate", [False, True])
def test_blocks_hold_the_stream_in_some_order(place: Path, isolate: bool):
    """Every token of three epochs once and in order, but for the order of the samples of a block."""
    corpus = build(place, isolate=isolate)
    stream = tokens_by_hand(corpus, 4)
    blocks = 3 * len(stream) // 4 // (WINDOW * SEQ_LEN)
    assert blocks > 20
    moved = orders = 0
    for block in range(blocks):
        wanted = [
            stream[at : at + SEQ_LEN + 1]
            for at in range(block * WINDOW * SEQ_LEN, (block + 1) * WINDOW * SEQ_LEN, SEQ_LEN)
        ]
        samples = [corpus.sample(block * WINDOW + i) for i in range(WINDOW)]
        found = [sample["tokens"].tolist() for sample in samples]
        assert sorted(found) == sorted(wanted)
        moved += found != wanted
        orders += found[0] == wanted[0]
        for i, (sample, cut) in enumerate(zip(samples, found, strict=True)):
            segments = [1 + (cut[:j].count(EOS) if isolate else 0) for j in range(SEQ_LEN + 1)]
            assert sample["segment_ids"].tolist() == segments and sample["counter"] == block * WINDOW + i
            counted = [t for j, t in enumerate(cut) if j and segments[j] == segments[j - 1] and t != EOS]
            assert sample["target_bytes"] == len(counted)
    assert moved > 0.9 * blocks and orders < 0.5 * blocks


def test_an_epoch_has_every_document_once(place: Path):
    corpus = build(place)
    every = Counter(text for shard in rows() for text in shard if trained_on(text))
    found = [text for _, _, text in take(Source(corpus.cfg), corpus, 3 * sum(every.values()))]
    for epoch in range(3):
        texts = found[epoch * sum(every.values()) :][: sum(every.values())]
        assert Counter(texts) == every and texts == epoch_by_hand(corpus, epoch)
    assert len({tuple(epoch_by_hand(corpus, epoch)) for epoch in range(3)}) > 1


def take(source: Source, corpus: StreamCorpus, count: int) -> list[tuple]:
    documents = source.endless(streaming.Bookmark().place, f"{corpus.fingerprint} {corpus.seed}")
    return [next(documents) for _ in range(count)]


def test_any_order_with_and_without_bookmarks(place: Path, tmp_path: Path):
    corpus = build(place)
    wanted = {n: corpus.sample(n)["tokens"].tolist() for n in range(150)}
    back = [149, 3, 148, 77, 0, 78, 76]
    for case in ("the same object", "bookmarks", "pickled", "damaged", "none", "no folder"):
        marks = corpus.marks
        if case == "damaged":
            lines = marks.read_bytes().splitlines(keepends=True)
            assert len(lines) > 20
            for i in range(len(lines)):  # one digit more
                at = lines[i].index(b'"token": ') + 9
                lines[i] = lines[i][:at] + b"7" + lines[i][at:]
            marks.write_bytes(b"\xff\xfe" + b"".join(lines)[:-9])
        elif case == "none":
            marks.unlink()
        elif case == "no folder":
            marks.unlink()
            marks.mkdir()  # which can be neither read nor written as a file
        other = corpus if case == "the same object" else build(place)
        if case == "pickled":
            other = pickle.loads(pickle.dumps(corpus))
            assert len(pickle.dumps(corpus)) < 4000
        assert {n: other.sample(n)["tokens"].tolist() for n in back} == {n: wanted[n] for n in back}, case


def test_going_on_reads_from_the_bookmark(place: Path, monkeypatch: pytest.MonkeyPatch):
    opened, encoded = [], []
    shard, encode = Source.shard, streaming.encode_documents

    def watched(self: Source, number: int, row: int = 0) -> Any:
        opened.append((number, row))
        return shard(self, number, row)

    corpus = build(place)
    wanted = [corpus.sample(n)["tokens"].tolist() for n in range(300)]
    monkeypatch.setattr(Source, "shard", watched)
    monkeypatch.setattr(
        streaming, "encode_documents", lambda texts, *rest: encoded.extend(texts) or encode(texts, *rest)
    )
    again = build(place)
    assert again.sample(200)["tokens"].tolist() == wanted[200]
    by_bookmark = len(encoded)
    assert len(opened) <= 3
    assert [again.sample(n)["tokens"].tolist() for n in range(200, 300)] == wanted[200:]
    corpus.marks.unlink()
    opened.clear(), encoded.clear()
    assert build(place).sample(200)["tokens"].tolist() == wanted[200]
    assert len(encoded) > 5 * by_bookmark and opened[0][1] == 0


def test_loaders_serve_the_counters(place: Path):
    """Also where processes are forked from one that has the dataset open in the middle."""
    corpus = build(place)
    corpus.sample(20)
    check_served(corpus, start=3, steps=4)
    shutil.rmtree(corpus.marks.parent)
    check_served(build(place), start=3, steps=4)


def test_packs_read_on(place: Path):
    corpus = build(place, pack=3, batch_size=6)
    for n in range(0, 60, 3):
        a, b, c = (corpus.sample(n + i)["tokens"] for i in range(3))
        assert a[-1] == b[0] and b[-1] == c[0]


def test_validation_is_held_out_and_the_same_for_every_seed(place: Path):
    one, two = build(place, seed=1), build(place, seed=2)
    for a, b in zip(one.validation(), two.validation(), strict=True):
        assert torch.equal(a["tokens"], b["tokens"])
    held_out = [text for shard in rows() for text in shard if text and not trained_on(text)]
    stream = one.held_out.read(0, len(one.held_out)).tokens.tolist()
    expected = [token for text in held_out for token in [*text.encode(), EOS]]
    assert stream == expected[: len(stream)] and len(stream) > 4 * SEQ_LEN and stream[-1] == EOS
    assert len(one.validation()) == 4
    assert one.fingerprint == two.fingerprint
    assert one.sample(0)["tokens"].tolist() != two.sample(0)["tokens"].tolist()


def test_fingerprint(place: Path, tmp_path: Path):
    first = build(place).fingerprint
    shutil.copytree(place, tmp_path / "copy")
    assert build(tmp_path / "copy", val_samples=3, seq_len=4, pack=2, isolate=True).fingerprint == first
    others = {build(place, window=12).fingerprint, build(place, val_fraction=0.3).fingerprint}
    write_shard(place, 9, ["one more"], next(place.iterdir()).suffix[1:])
    assert len({first, *others, build(place).fingerprint}) == 4


def test_a_source_that_changes_under_its_bookmarks_is_refused(place: Path):
    """Also where the new text is as long as the old one, so that the files look the same."""
    corpus = build(place)
    form = next(place.iterdir()).suffix[1:]
    for n in range(150):
        corpus.sample(n)
    for number, texts in enumerate(rows()):
        write_shard(place, number, [text.swapcase() for text in texts], form)
    corpus._reader = None
    with pytest.raises(
        ValueError, match=r"data\.path: '.*rows' has changed since an earlier run read it"
    ) as e:
        corpus.sample(140)
    assert "\n" not in str(e.value)


def test_bpe_knows_training_text_of_the_stream(place: Path):
    corpus = build_data(
        {"name": "stream", "path": str(place), "seq_len": SEQ_LEN, "window": WINDOW, "val_fraction": 0.2},
        {"name": "bpe", "vocab_size": 280},
    )
    assert 257 < corpus.tokenizer.vocab_size <= 280
    assert corpus.tokenizer.decode(corpus.sample(0)["tokens"]) != ""


def hub(monkeypatch: pytest.MonkeyPatch, sha: str | Exception) -> list[tuple]:
    """A Hub that knows one commit, or is not there."""
    asked: list[tuple] = []

    def dataset_info(self: Any, name: str, revision: str | None = None) -> Any:
        asked.append((name, revision))
        if isinstance(sha, Exception):
            raise sha
        return SimpleNamespace(sha=sha)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    return asked


def test_a_dataset_of_the_hub_is_read_at_a_commit(monkeypatch: pytest.MonkeyPatch):
    cfg = parse_data({"name": "stream", "path": "owner/set"})
    asked = hub(monkeypatch, COMMIT)
    with pytest.warns(UserWarning, match=rf"data\.revision: 'owner/set' is read at commit {COMMIT}"):
        assert pinned(cfg).revision == COMMIT
    with pytest.warns(UserWarning):
        pinned(dataclasses.replace(cfg, revision="main"))
    assert asked == [("owner/set", None), ("owner/set", "main")]
    fixed = dataclasses.replace(cfg, revision=COMMIT)
    assert pinned(fixed) is fixed and len(asked) == 2  # nothing to ask
    hub(monkeypatch, ConnectionError("no route"))
    with pytest.raises(
        ValueError, match=r"data\.revision: the commit of 'owner/set' cannot be looked up \(Conn"
    ):
        pinned(cfg)


BAD: dict[str, tuple[Callable[[Path], dict], str]] = {
    "folder's revision": (
        lambda p: {"path": str(p), "revision": "main"},
        r"data\.revision: only datasets of",
    ),
    "no folder": (lambda p: {"path": f"{p}/no"}, r"data\.path: no folder '.*no'"),
    "no path": (lambda p: {"path": None}, r"data\.path: data=stream needs one"),
    "whole validation": (lambda p: {"path": str(p), "val_samples": None}, r"data\.val_samples: data=stream"),
    "pack and window": (
        lambda p: {"path": str(p), "pack": 4},
        r"data\.pack: must divide data\.window=6, got 4",
    ),
    "window": (
        lambda p: {"path": str(p), "window": 0},
        r"data\.window: must be a whole number of at least 1",
    ),
    "limit": (lambda p: {"path": str(p), "max_bytes": 9}, r"data\.max_bytes: data=stream does not read it"),
    "field": (lambda p: {"path": str(p), "field": "body"}, r"data\.field: no 'body' in"),
    "numbers": (lambda p: {"path": str(p), "field": "id"}, r"data\.field: 'id' must hold text"),
    "all held out": (lambda p: {"path": str(p), "val_fraction": 0.9999999}, r"no text to train on"),
    "little held out": (
        lambda p: {"path": str(p), "val_fraction": 1e-9},
        r"leaves no document for validation",
    ),
    "too long": (
        lambda p: {"path": str(p), "seq_len": 10**5},
        r"data\.seq_len: must be under the \d+ tokens",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("place", ["jsonl"], indirect=True)
def test_bad_input_gets_one_line(place: Path, case: str):
    make, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        corpus = build_data(
            {"name": "stream", "seq_len": SEQ_LEN, "window": WINDOW, "val_fraction": 0.2, **make(place)},
            BYTES,
        )
        corpus.sample(0)
    assert "\n" not in str(caught.value)


def test_a_dataset_saved_whole_is_refused(tmp_path: Path):
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=r"data\.path: '.*saved' is a dataset saved as a whole.* use data=hf"
    ):
        build(tmp_path / "saved")
