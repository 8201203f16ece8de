"""Where documents come from: every source makes the same corpus of the same text."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from pathlib import Path

import datasets
import hydra
import pytest
from omegaconf import OmegaConf

from attnzoo.data import Corpus, build_data
from attnzoo.data.config import READ_BY, DataConfig
from attnzoo.data.mix import MixConfig

TEXTS = [f"text {i}: " + "the quick brown fox\n" * (i % 4 + 1) + "jumps, naïve 🙂" for i in range(12)]
BYTES = {"name": "bytes"}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def build(**data) -> Corpus:
    return build_data({"seq_len": 8, "val_fraction": 0.2, **data}, BYTES)


def text_of(corpus: Corpus, split: str) -> str:
    stream = getattr(corpus, split)
    return corpus.tokenizer.decode(stream.read(0, len(stream)).tokens)


def write(place: Path, form: str, texts: list[str] = TEXTS, field: str = "text") -> Path:
    """`texts` as plain files, JSON lines, parquet or a saved dataset."""
    rows = {"id": list(range(len(texts))), field: texts}
    place.mkdir(parents=True, exist_ok=True)
    if form == "txt":
        for i, text in enumerate(texts):
            (place / f"{i:02}.txt").write_text(text, newline="")
    elif form == "jsonl":
        lines = [json.dumps({"id": i, field: text}) for i, text in enumerate(texts)]
        (place / "rows.jsonl").write_text("\n".join(lines) + "\n\n")
    elif form == "parquet":
        datasets.Dataset.from_dict(rows).to_parquet(place / "rows.parquet")
    elif form == "saved":
        datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(place)
    return place


def test_all_sources_give_the_same_corpus(tmp_path: Path):
    plain, lines, table, saved = (
        write(tmp_path / form, form) for form in ("txt", "jsonl", "parquet", "saved")
    )
    sources = [
        {"name": "text", "path": str(plain)},
        {"name": "text", "path": f"{plain}/*.txt"},
        {"name": "text", "path": [f"{plain}/0*.txt", str(plain), f"{plain}/11.txt"]},
        {"name": "text", "path": str(lines)},
        {"name": "text", "path": str(lines / "rows.jsonl")},
        {"name": "text", "path": str(table / "*.parquet")},
        {"name": "hf", "path": str(saved)},
        {"name": "hf", "path": str(saved / "train")},
    ]
    assert len({build(**source).fingerprint for source in sources}) == 1


def test_streamed_or_not_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places = [write(tmp_path / form, form) for form in ("jsonl", "parquet")]
    wanted = build(name="text", path=str(places[0])).fingerprint
    for place in places:
        for streaming in (False, True):
            monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / f"cache {place.name} {streaming}"))
            assert build(name="hf", path=str(place), streaming=streaming).fingerprint == wanted
    assert list((tmp_path / "hf").rglob("*.arrow"))  # the copies that streaming does without


def test_other_fields_and_splits(tmp_path: Path):
    wanted = build(name="text", path=str(write(tmp_path / "txt", "txt"))).fingerprint
    lines = write(tmp_path / "jsonl", "jsonl", field="body")
    assert build(name="text", path=str(lines), field="body").fingerprint == wanted
    parts = {
        "a": datasets.Dataset.from_dict({"text": ["no"]}),
        "b": datasets.Dataset.from_dict({"text": TEXTS}),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    assert build(name="hf", path=str(tmp_path / "splits"), split="b").fingerprint == wanted


def test_limits(tmp_path: Path):
    plain = write(tmp_path / "txt", "txt")
    some = build(name="text", path=str(write(tmp_path / "some", "txt", TEXTS[:5]))).fingerprint
    assert build(name="text", path=str(plain), max_documents=5).fingerprint == some
    size = sum(len(text.encode()) for text in TEXTS[:5])
    for room in (size, size - len(TEXTS[4].encode()) + 1):
        assert build(name="text", path=str(plain), max_bytes=room).fingerprint == some


def test_bytes_that_are_not_utf8_can_be_replaced(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"good " * 9 + b"\xff bad")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "good good \xff bad"}\n{"text": "half \\ud83d a pair"}\n')
    corpus = build(name="text", path=str(tmp_path), errors="replace")
    texts = text_of(corpus, "train") + text_of(corpus, "val")
    assert texts.count("\ufffd") == 2 and "half ? a pair" in texts


def test_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    corpus = build_data({"name": "stdlib", "max_documents": 20, "val_samples": 4}, BYTES)
    assert "import" in text_of(corpus, "train")
    assert len(corpus.validation()) == 4
    for name in ("a.py", "sub/b.txt", "test/c.py", "site-packages/d.py", "e.bin", "_sysconfigdata_x.py"):
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_text(f"this is {name}, " * 9)
    (tmp_path / "lib" / "latin.py").write_bytes("# -*- coding: latin-1 -*- é".encode("latin-1"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    corpus = build(name="stdlib", val_fraction=0.5)
    texts = text_of(corpus, "train") + text_of(corpus, "val")
    assert sorted(set(texts.replace("this is ", "").split(", "))) == ["", "a.py", "sub/b.txt"]


def test_configs_say_what_the_code_would_do():
    """Each YAML names the keys that its corpus reads and no other, with the defaults of the code."""
    configs = Path(__file__).parents[1] / "configs"
    with hydra.initialize_config_dir(str(configs), version_base=None):
        for name in ("stdlib", "text", "hf", "tokens", "stream"):
            values = OmegaConf.to_container(hydra.compose(f"data/{name}"))["data"]
            ignored = {key for key, readers in READ_BY.items() if name not in readers} - {"path"}
            assert set(values) == {field.name for field in dataclasses.fields(DataConfig)} - ignored
            values["path"] = None if name == "stdlib" else "x"
            assert DataConfig(**values) == DataConfig(name=name, path=values["path"])
        values = OmegaConf.to_container(hydra.compose("data/mix"))["data"]
        fields = {field.name: field.default for field in dataclasses.fields(MixConfig)} | {"sources": {}}
        del fields["shares"]  # which the weights say
        assert values == {"name": "mix", **fields}
        for name, given in (("bytes", {}), ("bpe", {"vocab_size": 2048}), ("saved", {"path": None})):
            assert OmegaConf.to_container(hydra.compose(f"tokenizer/{name}"))["tokenizer"] == {
                "name": name,
                **given,
            }
