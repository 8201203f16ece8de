"""`attnzoo convert`, from a run folder to a new one, and training on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.cli import main
from attnzoo.convert import convert
from runs import train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its cache and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, "trainer.max_steps=2", "attention.num_kv_heads=1", "attention=gqa")
    return folder


def test_converts_and_trains_on(made: Path, capsys: pytest.CaptureFixture) -> None:
    out = made / "converted"
    command = ["convert", str(made / "run"), "elitekv", str(out), "num_rope_pairs=4", "kv_rank=8"]
    assert main([*command, "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert "held-out nats/token" in printed and f"init_from={out} model.layout=init_from" in printed
    report = json.loads((out / "convert.json").read_text())
    assert report["source"] == "run" and report["method"] == "elitekv"
    # all pairs kept and full rank: the same function
    assert report["logit_change"] < 1e-5 and abs(report["loss"][0] - report["loss"][1]) < 1e-5
    model, _ = attnzoo.load(out)
    assert [mixer.name for mixer in model.mixers] == ["elitekv"] * 2

    run, summary = train(made, f"init_from={out}", "model.layout=init_from", "trainer.max_steps=2", name="on")
    assert summary["status"] == "completed" and summary["variant"] == "elitekv"
    assert run.model.config["kv_rank"] == 8


def test_loss_is_that_of_the_models(made: Path) -> None:
    """The report's losses are recomputed here token by token."""
    model, tokenizer = attnzoo.load(made / "run")
    tokens = torch.randint(0, tokenizer.vocab_size, (3, 12))
    new, report = convert(model, "mha2mla", tokens, tokens, num_rope_pairs=1, kv_rank=4)
    for found, expected in zip((model, new), report.loss, strict=True):
        with torch.no_grad():
            p = torch.stack([found(row[None, :-1])[0].softmax(-1) for row in tokens])
        picked = p.gather(-1, tokens[:, 1:, None])
        assert abs(float(-picked.log().mean()) - expected) < 1e-5


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "nla", "out"], "method: 'nla' is none"),
        (["run", "gqa", "out", "num_kv_heads"], "option: must be key=value, got 'num_kv_heads'"),
        (["run", "gqa", "run", "num_kv_heads=1"], "holds another run"),
        (["nothing", "gqa", "out", "num_kv_heads=1"], "does not exist"),
        (["run", "gqa", "out", "num_kv_heads=1", "--samples", "0"], "--samples: must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(
    made: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.chdir(made)
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (made / "out").exists()


def test_layout_of_nothing_is_refused(made: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.layout: 'init_from' takes the architecture of init_from"):
        train(made, "model.layout=init_from", name="none")
