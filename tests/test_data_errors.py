"""What bad data gets: one line that names the field, the rule, the value and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from attnzoo.data import Corpus, build_data


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def build(**data) -> Corpus:
    return build_data({"seq_len": 8, "val_fraction": 0.2, **data}, {"name": "bytes"})


def table(place: Path, field: str = "text") -> str:
    """A folder with one parquet file of the columns `id` and `field`."""
    place.mkdir()
    datasets.Dataset.from_dict({"id": [0, 1], field: ["a", "b"]}).to_parquet(place / "rows.parquet")
    return str(place)


def saved(place: Path) -> str:
    """A saved dataset of the columns `id` and `text`, of one split."""
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"id": [0], "text": ["a"]})).save_to_disk(place)
    return str(place)


def bad(tmp_path: Path, content: bytes | str, suffix: str, **data) -> dict:
    """The data group for one file of this content."""
    file = tmp_path / f"bad.{suffix}"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return {"name": "text", "path": str(file), **data}


GOOD_LINE = '{"text": "a line that is fine"}\n'
BAD_INPUT: dict[str, tuple[Callable[[Path], dict], str]] = {
    "no such file": (
        lambda p: {"name": "text", "path": f"{p}/no.txt"},
        r"data\.path: '.*no\.txt' does not exist; give a file",
    ),
    "no match": (
        lambda p: {"name": "text", "path": f"{p}/*.txt"},
        r"data\.path: no file matches '.*\*\.txt'; give a file",
    ),
    "no usable file": (
        lambda p: {"name": "text", "path": str(p)},
        r"data\.path: directory '.*' holds no \.txt, .*; name",
    ),
    "no path": (lambda p: {"name": "text"}, r"data\.path: data=text needs one, got None; give a file"),
    "empty": (lambda p: bad(p, "", "txt"), r"data\.path: '.*bad\.txt' holds no text; give"),
    "not UTF-8": (
        lambda p: bad(p, b"abc\xff", "txt"),
        r"data\.path: '.*bad\.txt' is not UTF-8 at byte 3; convert it or set data\.errors=replace",
    ),
    "lines not UTF-8": (
        lambda p: bad(p, GOOD_LINE.encode() + b'{"text": "\xff"}', "jsonl"),
        r"'.*bad\.jsonl' is not UTF-8 at byte 42; ",
    ),
    "not JSON": (
        lambda p: bad(p, GOOD_LINE + "{'a'}", "jsonl"),
        r"data\.path: '.*bad\.jsonl:2' is not JSON \(.* column 2\)",
    ),
    "no object": (
        lambda p: bad(p, "[1]", "jsonl"),
        r"data\.path: '.*bad\.jsonl:1' holds a list; give one JSON object",
    ),
    "half a pair": (
        lambda p: bad(p, '{"text": "\\ud83d"}', "jsonl"),
        r"'.*bad\.jsonl:1' escapes half .* data\.errors",
    ),
    "no field": (
        lambda p: bad(p, '{"id": 1, "body": "a"}', "jsonl"),
        r"data\.field: no 'text' in '.*bad\.jsonl:1'; choose one of id, body",
    ),
    "number": (
        lambda p: bad(p, '{"text": 3}', "jsonl"),
        r"data\.field: 'text' must hold text, is 3 in '.*:1'; name another",
    ),
    "no parquet": (
        lambda p: bad(p, "PAR1", "parquet"),
        r"data\.path: '.*bad\.parquet' cannot be read \(.*\)",
    ),
    "parquet field": (
        lambda p: {"name": "text", "path": table(p / "q", "body")},
        r"data\.field: no 'text' in '.*rows\.parquet'; choose one of id, body",
    ),
    "parquet numbers": (
        lambda p: {"name": "text", "path": table(p / "q"), "field": "id"},
        r"data\.field: 'id' must hold text, is int64 in '.*rows\.parquet'",
    ),
    "hf file": (
        lambda p: {**bad(p, "a", "txt"), "name": "hf"},
        r"data\.path: '.*bad\.txt' is a file .* use data=text",
    ),
    "hf folder": (lambda p: {"name": "hf", "path": f"{p}/no"}, r"data\.path: no folder '.*no'; give"),
    "hf name": (
        lambda p: {"name": "hf", "path": "no-such-set"},
        r"data\.path: no dataset from 'no-such-set' \(.*\); give",
    ),
    "hf malformed": (
        lambda p: {
            "name": "hf",
            "path": str(Path(bad(p, "{'a'}\n", "jsonl")["path"]).parent),
            "streaming": True,
        },
        r"data\.path: no dataset from '.*' \(.*\); give",
    ),
    "hf split": (
        lambda p: {"name": "hf", "path": saved(p / "q"), "split": "test"},
        r"data\.split: no 'test' in '.*q'; choose one of train",
    ),
    "hf field": (
        lambda p: {"name": "hf", "path": saved(p / "q"), "field": "body"},
        r"data\.field: no 'body' in '.*q'; choose one of id, text",
    ),
    "hf numbers": (
        lambda p: {"name": "hf", "path": saved(p / "q"), "field": "id"},
        r"data\.field: 'id' must hold text, is 0 in '.*q'",
    ),
    "training too short": (
        lambda p: {**bad(p, "0123456789", "txt"), "seq_len": 9},
        r"data\.seq_len: must be under the 9 tokens of training text, got 9; lower it",
    ),
    "validation too short": (
        lambda p: bad(p, "0123456789" * 9, "txt", val_fraction=0.05),
        r"data\.seq_len: must be under the 6 tokens of validation text, got 8; lower it",
    ),
    "one character": (
        lambda p: bad(p, "a", "txt"),
        r"data\.path: the text is too short to hold a part of it out; give more",
    ),
    "cache": (
        lambda p: {**bad(p, "a" * 99, "txt"), "cache_dir": str(p / "bad.txt")},
        r"data\.cache_dir: '.*bad\.txt.*' cannot be written \(.*\); set data\.cache_dir or ATTNZOO_CACHE",
    ),
    "unknown corpus": (
        lambda p: {"name": "txt"},
        r"data\.name: must be one of stdlib, text, hf, tokens, stream, mix, got 'txt'",
    ),
    "unknown key": (
        lambda p: {"sequence_len": 4},
        r"data\.sequence_len: no such key, got 4; did you mean 'seq_len'\?",
    ),
    "unread key": (
        lambda p: {"path": "a"},
        r"data\.path: data=stdlib does not read it, got 'a'; .* data=text or data=hf",
    ),
    "seq_len": (lambda p: {"seq_len": 0}, r"data\.seq_len: must be a whole number of at least 1, got 0"),
    "max_bytes": (
        lambda p: {"max_bytes": 1.5},
        r"data\.max_bytes: must be a whole number of at least 1 or null, got 1\.5",
    ),
    "val_fraction": (
        lambda p: {"val_fraction": 1.0},
        r"data\.val_fraction: must lie strictly between 0 and 1, got 1\.0",
    ),
    "isolate": (lambda p: {"isolate": "no"}, r"data\.isolate: must be true or false, got 'no'"),
    "errors": (
        lambda p: {"name": "text", "errors": "ignore"},
        r"data\.errors: must be one of strict, replace, got 'ignore'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line(case: str, tmp_path: Path):
    make, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message) as caught:
        build(**make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("manifest.json")) or "data.seq_len" in message.replace(
        "\\", ""
    )


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"name": "byte"}, r"tokenizer\.name: must be one of bytes, bpe, saved, got 'byte'"),
        (
            {"name": "bytes", "vocab_size": 300},
            r"tokenizer\.vocab_size: tokenizer=bytes does not read it, got 300",
        ),
        (
            {"name": "bpe"},
            r"tokenizer\.vocab_size: must be a whole number of at least 257 \(256 bytes .*\), got None",
        ),
        ({"name": "bpe", "vocab_size": 256}, r"tokenizer\.vocab_size: .*, got 256"),
        ({"name": "saved"}, r"tokenizer\.path: tokenizer=saved needs one, got None; give a tokenizer\.json"),
        (
            {"name": "saved", "path": "no/such"},
            r"tokenizer\.path: 'no/such' does not exist; give a tokenizer\.json",
        ),
    ],
)
def test_bad_tokenizer_options(tokenizer: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_data({"name": "stdlib"}, tokenizer)
