"""Tokenizers: any text comes back, every byte is counted once, and what is saved is what is loaded."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from attnzoo.data import ByteTokenizer, HFTokenizer, Tokenizer, load_tokenizer
from attnzoo.data.tokenizer import train_bpe

TEXT = "def area(w, h):\n    return w * h  # naïve, 東京 🙂\n\n\nprint(area(3, 4))\n"
SPECIAL = "<|endoftext|>"


def byte_level(special: bool = True) -> HFTokenizer:
    """A GPT-2 style tokenizer: its end token is in the vocabulary, and it would add it and truncate."""
    backend = train_bpe([TEXT * 20], 290).backend
    if special:
        backend.add_special_tokens([SPECIAL])
        end = backend.token_to_id(SPECIAL)
        backend.post_processor = processors.TemplateProcessing(
            f"{SPECIAL} $A", special_tokens=[(SPECIAL, end)]
        )
        backend.enable_truncation(4)
    return HFTokenizer(backend, backend.token_to_id(SPECIAL))


def sentencepiece() -> HFTokenizer:
    """A Llama-2 style tokenizer: visible blanks, a leading one of its own, rare characters as bytes."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnop", "▁a", "▁ab", "ï"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return HFTokenizer(backend)


KINDS = {
    "bytes": ByteTokenizer,
    "bpe": lambda: train_bpe([TEXT * 20], 290),
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


def unicode_texts(count: int = 60) -> list[str]:
    """Random strings over all of Unicode but the surrogates, which are no characters."""
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    draw = random.Random(5)
    sizes = [draw.randrange(30) for _ in range(count)]
    return ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(size)) for size in sizes]


def test_any_text_comes_back(tokenizer: Tokenizer):
    for text in [TEXT, "", "\0", "  a\r\n\t", f"a{SPECIAL}b", "a\u0301", *unicode_texts()]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.eos_id for i in ids)


def test_every_byte_is_counted(tokenizer: Tokenizer):
    own_blank = tokenizer.byte_length(tokenizer.encode("a")) - 1  # the leading one of SentencePiece
    for text in [TEXT, f"a{SPECIAL}b", *filter(None, unicode_texts())]:
        assert tokenizer.byte_length(tokenizer.encode(text)) == len(text.encode()) + own_blank


def test_byte_length_of_ranges():
    """Between any two tokens of ASCII text, the count is that of the decoded range."""
    tokenizer = byte_level()
    text = TEXT[:34]
    ids = tokenizer.encode(text)
    assert len(ids) < len(text)
    for start in range(len(ids)):
        for stop in range(start, len(ids) + 1):
            assert tokenizer.byte_length(ids[start:stop]) == len(tokenizer.decode(ids[start:stop]))
    assert tokenizer.byte_length(torch.tensor([ids, ids])) == 2 * len(text)


def test_end_of_document(tokenizer: Tokenizer):
    assert tokenizer.byte_length([tokenizer.eos_id] * 3) == 0
    assert tokenizer.decode([*tokenizer.encode("a b"), tokenizer.eos_id]) == "a b"
    assert tokenizer.eos_id < tokenizer.vocab_size == len(tokenizer.token_bytes)


def test_saved_is_loaded(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "new" / "folder")
    for other in (load_tokenizer(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer)
        assert (other.vocab_size, other.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert other.encode(TEXT) == tokenizer.encode(TEXT)
        assert other.fingerprint == tokenizer.fingerprint
        assert (other.token_bytes == tokenizer.token_bytes).all()


def test_fingerprints_tell_tokenizers_apart():
    assert len({KINDS[kind]().fingerprint for kind in KINDS} | {train_bpe([TEXT * 20], 289).fingerprint}) == 5


def test_bpe_is_a_function_of_the_text():
    """A process with another hash seed trains the same vocabulary."""
    program = (
        "import sys; from attnzoo.data.tokenizer import train_bpe; "
        "print(train_bpe(sys.argv[1:], 290).fingerprint)"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.check_output([sys.executable, "-c", program, TEXT], env=env, text=True)
    assert found.strip() == train_bpe([TEXT], 290).fingerprint


def test_bpe_says_its_true_size():
    assert train_bpe([TEXT * 20], 290).vocab_size == 290
    assert train_bpe(["aaaa"], 5000).vocab_size < 265


def test_hugging_face_folders(tmp_path: Path):
    tokenizer = byte_level()
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(tmp_path / "tokenizer.json")
    assert (
        plain.eos_id == plain.vocab_size - 1 == tokenizer.vocab_size
    )  # nothing names an end token: a new id
    for name in (SPECIAL, {"content": SPECIAL}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": name}))
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            found = load_tokenizer(path)
            assert (found.eos_id, found.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
            assert found.encode(TEXT) == tokenizer.encode(TEXT)


def test_hugging_face_folder_without_tokenizer_json(tmp_path: Path):
    tokenizer = byte_level(special=False)
    model = json.loads(tokenizer.backend.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({**model["vocab"], SPECIAL: len(model["vocab"])}))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": SPECIAL}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_tokenizer(tmp_path)
    assert found.eos_id == len(model["vocab"])
    assert found.encode(TEXT) == tokenizer.encode(TEXT)


@pytest.mark.parametrize("loses", ["case", "blanks", "unknown"])
def test_a_tokenizer_that_loses_text_is_refused(loses: str, tmp_path: Path):
    backend = byte_level(special=False).backend
    if loses == "case":
        backend.normalizer = normalizers.Lowercase()
    elif loses == "blanks":
        backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    else:
        backend = Backend(models.WordLevel({"<unk>": 0, "return": 1}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"^tokenizer\.path: '.*' loses text .*; give a byte-level .*$"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [None, "{", '{"model": 3}', "folder"])
def test_what_is_no_tokenizer(content: str | None, tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    if content == "folder":
        path = tmp_path / "empty"
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    with pytest.raises(
        ValueError, match=r"^tokenizer\.path: [^\n]*; give a tokenizer\.json or the folder[^\n]*$"
    ):
        load_tokenizer(path)
