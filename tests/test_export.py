"""Weights as safetensors, and what reads them again; checkpoints written in the background."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import attnzoo
from attnzoo.cli import main
from attnzoo.train import callbacks
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.guard import RunFailed
from attnzoo.train.sharded import read_sharded
from attnzoo.train.store import save_checkpoint
from runs import train


def test_an_export_gives_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tmp_path, "trainer.max_steps=1", "model.tie_head=true")
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    config = json.loads((out / "config.json").read_text())
    weights = load_file(out / "model.safetensors")
    assert len(config["shared"]) == 1 and not set(config["shared"]) & set(weights)
    (model, _), (again, tokenizer) = attnzoo.load(run), attnzoo.load(out)
    tokens = torch.randint(257, (1, 9))
    assert torch.equal(model(tokens), again(tokens)) and tokenizer.vocab_size == 257
    options = ("model.tie_head=true", "optim.lr=0", "trainer.max_steps=1")
    started, _ = train(tmp_path, *options, f"init_from={out}", name="started")
    assert all(torch.equal(p, q) for p, q in zip(started.model.parameters(), model.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"ckpt_path: .*weights only.*init_from"):
        train(tmp_path, f"ckpt_path={out}", name="resumed")
    assert main(["export", str(run), str(out)]) == 2
    (out / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"checkpoint: .*damaged"):
        attnzoo.load(out)


@pytest.mark.parametrize("tied", [{"head": "embed"}, None])
def test_shards_of_tied_weights_are_put_together_once(tmp_path: Path, tied: dict[str, str] | None) -> None:
    """Earlier versions kept no record of them: the same numbers, twice."""
    whole = torch.randn(5, 3)
    for rank, part in enumerate(whole.split(3)):
        shard = {"model": {"embed": part, "head": part}, "optimizer": {"embed": {"exp_avg": part}}}
        torch.save(shard, tmp_path / f"rank-{rank:05d}.pt")
    parts = {"batches": 2, "tensor": 1, "cuts": {}} | ({"tied": tied} if tied else {})
    torch.save({"parts": parts}, tmp_path / "run.pt")
    read = read_sharded(tmp_path)
    assert all(torch.equal(read["model"][name], whole) for name in ("embed", "head"))
    assert torch.equal(read["optimizer"]["embed"]["exp_avg"], whole)
    assert (read["model"]["head"] is read["model"]["embed"]) is (tied is not None)


def test_the_background_writes_what_the_foreground_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()

    def watched(*args: object) -> Path:
        threads.add(threading.current_thread().name)
        return save_checkpoint(*args)

    monkeypatch.setattr(callbacks, "save_checkpoint", watched)
    every = ("callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=9")
    train(tmp_path, *every, name="front")
    assert threads == {"MainThread"}
    train(tmp_path, *every, "callbacks.checkpoint.background=true", name="back")
    assert threads == {"MainThread", "checkpoint"}
    for step in range(1, 5):
        name = f"checkpoints/step-{step:08d}.pt"
        front, back = (read_checkpoint(tmp_path / run / name) for run in ("front", "back"))
        for key, value in front["model"].items():
            assert torch.equal(value, back["model"][key]), (step, key)
        for key, state in front["optimizer"].items():
            assert all(torch.equal(state[name], back["optimizer"][key][name]) for name in state)


@pytest.mark.parametrize("victim", [2, 4])
def test_a_failure_in_the_background_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    def failing(folder: Path, step: int, *args: object) -> Path:
        if step == victim:
            raise RunFailed(f"checkpoint of step {step}: the disk is full")
        return save_checkpoint(folder, step, *args)

    monkeypatch.setattr(callbacks, "save_checkpoint", failing)
    options = ("callbacks.checkpoint.every=1", "callbacks.checkpoint.background=true")
    with pytest.raises(RunFailed, match=f"step {victim}: the disk is full"):
        train(tmp_path, *options)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == victim - 1
