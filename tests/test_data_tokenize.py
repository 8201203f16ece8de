"""`attnzoo tokenize`: the same bytes in any number of processes, and after being killed anywhere."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from filelock import FileLock

from attnzoo.cli import main
from attnzoo.data import build_data, load_tokenizer
from attnzoo.data import tokenize as module
from attnzoo.data.manifest import Manifest, read_manifest
from attnzoo.data.shards import ShardWriter
from attnzoo.data.split import digest
from attnzoo.data.tokenizer import train_bpe
from data_parts import BYTES, documents, shards_of, write_texts

BPE = {"name": "bpe", "vocab_size": 300}


@pytest.fixture
def source(tmp_path: Path) -> dict:
    return write_texts(tmp_path / "texts", documents(60))


def content(folder: Path) -> dict[str, bytes]:
    """Every file that is not hidden."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.multi
@pytest.mark.slow
def test_processes_make_no_difference(source: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PIECE", 200)  # many batches
    for n in (1, 2, 3):
        shards_of(tmp_path / str(n), source, tokenizer=BPE, processes=n)
    assert content(tmp_path / "1") == content(tmp_path / "2") == content(tmp_path / "3")


def test_the_size_of_batches_makes_no_difference(
    source: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shards_of(tmp_path / "a", source, tokenizer=BPE)
    monkeypatch.setattr(module, "PIECE", 50)
    shards_of(tmp_path / "b", source, tokenizer=BPE)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def killed(out: Path, source: dict, where: str, count: int) -> None:
    """Tokenise in a process that kills itself, without a chance to tidy up, at the `count`-th such moment."""

    def die(*_: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if where == "before the journal":
        module.add_to_journal = die
    elif where == "between two shards":
        close = ShardWriter.close
        ShardWriter.close = lambda self: (close(self), die())[0]
    elif where == "in a shard":
        add = ShardWriter.add
        ShardWriter.add = lambda self, *args: (add(self, *args), self._file.flush(), die())[0]
    elif where == "before the manifest":
        module.write_atomic = die
    elif where == "before the tokenizer":
        module.os = type("Killer", (), {"replace": die})
    shards_of(out, source, tokenizer=BPE, report=die if where == "after a shard" else lambda shard: None)


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("after a shard", 0),
        ("after a shard", 5),
        ("before the journal", 0),
        ("between two shards", 0),
        ("between two shards", 4),
        ("in a shard", 1),
        ("in a shard", 33),
        ("before the manifest", 0),
        ("before the tokenizer", 0),
    ],
)
def test_killed_and_resumed(source: dict, tmp_path: Path, where: str, count: int):
    shards_of(tmp_path / "whole", source, tokenizer=BPE)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=killed, args=(out, source, where, count))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="has not finished there"):
        read_manifest(out)
    lines = (out / "progress.jsonl").read_text().splitlines()[1:]
    names = [
        shard["name"] for line in map(json.loads, lines) for shard in (line["train"], line["val"]) if shard
    ]
    assert names or (where, count) not in (
        ("after a shard", 5),
        ("between two shards", 4),
        ("in a shard", 33),
    )
    kept = {name: (out / name).stat().st_mtime_ns for name in names}
    reported: list[str] = []
    shards_of(out, source, tokenizer=BPE, report=lambda shard: reported.append(shard.name))
    assert content(out) == content(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in names} == kept
    assert not set(reported) & set(names)
    assert len(reported) + len(names) == len(content(out)) - 1 - len(list((out / "tokenizer").iterdir()))


def interrupted(out: Path, source: dict, after: int = 4) -> None:
    """Tokenise, and stop with an error once so many shards are finished."""
    count = 0

    def stop(shard: object) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards_of(out, source, report=stop)


@pytest.mark.parametrize("damage", ["torn line", "nonsense", "outside", "shard cut", "shard gone"])
def test_a_damaged_journal_or_shard_is_done_again(source: dict, tmp_path: Path, damage: str):
    shards_of(tmp_path / "whole", source)
    out = tmp_path / "out"
    interrupted(out, source, 6)
    file = out / "progress.jsonl"
    first, *lines = file.read_text().splitlines(keepends=True)
    assert len(lines) > 3
    if damage == "torn line":
        lines[-1] = lines[-1][:-1]
    elif damage == "nonsense":
        lines[2] = "{]\n"
    elif damage == "outside":
        lines[2] = lines[2].replace("train-00002", "../train-00002")
    elif damage == "shard cut":
        os.truncate(out / "train-00001.bin", 9)
    else:
        (out / "train-00001.bin").unlink()
    file.write_text("".join([first, *lines]))
    shards_of(out, source)
    assert content(out) == content(tmp_path / "whole")


def test_a_finished_folder_is_left_alone(source: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = shards_of(tmp_path / "out", source)
    monkeypatch.setattr(module, "texts_of", None)
    assert shards_of(tmp_path / "out", source) == first


@pytest.mark.parametrize("finished", [False, True])
def test_another_plan_is_refused(source: dict, tmp_path: Path, finished: bool):
    out = tmp_path / "out"
    if finished:
        shards_of(out, source)
    else:
        interrupted(out, source)
    for change, word in (
        (lambda: shards_of(out, source, shard_tokens=200), "shard_tokens"),
        (lambda: shards_of(out, source, tokenizer=BPE), "tokenizer"),
        (lambda: shards_of(out, {**source, "val_fraction": 0.3}), "val_fraction"),
        (lambda: shards_of(out, {**source, "max_documents": 7}), "source"),
    ):
        with pytest.raises(ValueError, match=rf"out: '.*' was begun with another {word}; give a new folder"):
            change()
    (tmp_path / "texts" / "0003.txt").write_text("changed")
    with pytest.raises(ValueError, match="another source"):
        shards_of(out, source)


def test_where_it_does_not_write(source: dict, tmp_path: Path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out: '.*mine' holds other files, such as 'thesis\.txt'"):
        shards_of(out, source)
    with pytest.raises(ValueError, match=r"out: '.*thesis\.txt' cannot be written \(.*\); make room"):
        shards_of(out / "thesis.txt", source)
    busy = tmp_path / "busy"
    busy.mkdir()
    with FileLock(busy / ".lock"), pytest.raises(ValueError, match=r"out: another process writes in"):
        shards_of(busy, source)
    assert content(out) == {"thesis.txt": b"precious"}


def test_a_full_disk_keeps_what_is_finished(source: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards_of(tmp_path / "whole", source)
    fsync, left = os.fsync, 9

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        ValueError, match=r"out: .* \(No space left on device\); make room .* shards are kept"
    ):
        shards_of(tmp_path / "out", source)
    monkeypatch.setattr(os, "fsync", fsync)
    assert (tmp_path / "out" / "train-00000.bin").exists()
    assert not list((tmp_path / "out").glob(".*.tmp"))
    shards_of(tmp_path / "out", source)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_is_held_out_is_a_function_of_the_document(source: dict, tmp_path: Path):
    """So that copies stay on one side and a source need not be known before it is read."""
    shards_of(tmp_path / "one", source)
    few = write_texts(tmp_path / "few", documents(60)[:20] * 2)
    shards_of(tmp_path / "two", few, shard_tokens=10**9)
    sides = [texts(tmp_path / name, read_manifest(tmp_path / name)) for name in ("one", "two")]
    assert set(sides[0]["val"]) & set(documents(60)[:20]) == set(sides[1]["val"])
    assert sorted(sides[1]["train"] + sides[1]["val"]) == sorted(documents(60)[:20] * 2)
    expected = [t for t in documents(60) if int.from_bytes(digest(t)[:8], "little") / 2**64 < 0.2]
    assert sides[0]["val"] == expected and 4 < len(expected) < 20


def texts(out: Path, manifest: Manifest) -> dict[str, list[str]]:
    corpus = build_data({"name": "tokens", "path": str(out), "seq_len": 4}, BYTES)
    tokenizer, found = load_tokenizer(out / "tokenizer"), {}
    for split in manifest.shards:
        stream = getattr(corpus, split)
        piece = stream.read(0, len(stream))
        starts = [0, *(piece.ends + 1)]
        pairs = zip(starts, piece.ends, strict=False)
        found[split] = [tokenizer.decode(piece.tokens[a:b]) for a, b in pairs]
    return found


def test_bpe_knows_training_text_only(source: dict, tmp_path: Path):
    manifest = shards_of(tmp_path / "out", source, tokenizer=BPE)
    sides = texts(tmp_path / "out", manifest)
    own = load_tokenizer(tmp_path / "out" / "tokenizer").fingerprint
    assert own == train_bpe(sides["train"], 300).fingerprint
    assert own != train_bpe(sides["train"] + sides["val"], 300).fingerprint


def test_one_side_without_text_is_refused(tmp_path: Path):
    source = write_texts(tmp_path / "texts", ["only one"])
    with pytest.raises(ValueError, match=r"data\.val_fraction: leaves no document for (val|train)"):
        shards_of(tmp_path / "out", source)
    empty = write_texts(tmp_path / "none", [""])
    with pytest.raises(ValueError, match=r"data\.path: '.*none' holds no text"):
        shards_of(tmp_path / "out2", empty)


def test_the_command(source: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "out"
    command = ["tokenize", str(out), "data=text", f"data.path={source['path']}", "data.val_fraction=0.2"]
    assert main([*command, "--shard-tokens", "300"]) == 0
    assert f"train on it with data=tokens data.path={out}" in capsys.readouterr().out
    assert read_manifest(out).fingerprint == shards_of(tmp_path / "other", source).fingerprint
    for arguments, words in (
        ([*command, "--shard-tokens", "0"], "--shard-tokens: must be a whole number of at least 1, got 0"),
        ([*command, "--processes", "0"], "--processes: must be"),
        (["tokenize", str(out), "data=synthetic/mqar"], "data: must be one of stdlib, text, hf"),
        (["tokenize", str(out), "data=tex"], "data: no choice 'tex'"),
        (["tokenize", str(out), "data=text", "data.pth=3"], "data.pth: no such key"),
        (["tokenize", str(out), "data=text", "--check"], "--check: reads the folder alone"),
        (["tokenize", str(tmp_path / "no"), "--check"], "no manifest|data.path: no"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert any(part in error for part in words.split("|")) and error.count("\n") == 1


@pytest.mark.parametrize("at", range(4))
def test_options_and_overrides_mix_in_any_order(source: dict, tmp_path: Path, at: int):
    out = tmp_path / "out"
    arguments = [str(out), "data=text", f"data.path={source['path']}", "data.val_fraction=0.2"]
    arguments[at:at] = ["--shard-tokens", "300"]
    assert main(["tokenize", *arguments]) == 0
    assert read_manifest(out).fingerprint == shards_of(tmp_path / "other", source).fingerprint


def test_what_is_no_option_stays_a_mistake(capsys: pytest.CaptureFixture):
    for arguments in (
        ["tokenize", "out", "data=text", "--shards", "3", "seed=1"],
        ["export", "run", "out", "more"],
    ):
        assert main(arguments) == 2
        assert "unrecognized arguments" in capsys.readouterr().err
