"""What bad input gets: one line that names field, rule, value and way out; nothing is written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo import registry
from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.cli import main
from attnzoo.train.checkpoint import find_checkpoint, read_checkpoint
from runs import overrides, train


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its cache and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, "trainer.max_steps=1")
    return folder


def contents(folder: Path) -> list[Path]:
    """All files but those of the data cache, which any run may fill."""
    return sorted(path for path in folder.rglob("*") if "cache" not in path.parts)


@pytest.fixture
def refused(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    """A function: run `attnzoo train` with bad input, and return the one line that it must print."""
    monkeypatch.chdir(tmp_path)
    before = contents(made)

    def run(*options: str, here: tuple[str, ...] = ()) -> str:
        code = main(["train", *overrides(made, *options)])
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
        assert "Traceback" not in err
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(here)
        assert contents(made) == before
        return err

    return run


MODEL = {
    "attention=mlla": ["attention", "mlla", "mla"],
    "model.layout=mlla": ["variant", "mlla", "mla"],
    "attention.widnow=4": ["widnow", "did you mean window", "legal"],
    "attention.kv_lora_rank=4": ["kv_lora_rank", "legal"],  # another variant's option
    "model.dim=15": ["dim", "15", "num_heads=2"],
    "attention=gqa attention.num_kv_heads=3": ["num_kv_heads", "3", "[1, 2]"],
    "attention.head_dim=7": ["head_dim", "7", "even", "pos=none"],
    "attention.window=0": ["window", "0", "at least 1"],
    "attention.impl=cuda": ["impl", "cuda", "reference"],
    "model.depth=0": ["depth", "0", "at least 1"],
    "+model.colour=red": ["colour"],
}
SETTINGS = {
    "trainer.max_stepz=4": ["trainer.max_stepz", "trainer.max_steps"],
    "optimiser.lr=1": ["optimiser.lr", "optim.lr"],
    "modle=nano": ["modle", "model"],
    "model=huge": ["model", "huge", "nano"],
    "optim.lr=fast": ["optim.lr", "number", "'fast'"],
    "optim.lr=-1": ["optim.lr", "at least 0", "-1"],
    "optim.schedule=linear": ["optim.schedule", "cosine", "linear"],
    "optim.warmup=2": ["optim.warmup", "[0, 1]", "2"],
    "+optim.nesterov=true": ["optim.nesterov", "no such key", "momentum"],
    "trainer.max_steps=0": ["trainer.max_steps", "at least 1", "0"],
    "trainer.max_time=soon": ["trainer.max_time", "seconds", "'soon'"],
    "trainer.precision=fp16": ["trainer.precision", "bf16", "fp16"],
    "trainer.accumulate=3": ["data.batch_size", "3", "4"],
    "trainer.aux_weights={balance: 1}": ["trainer.aux_weights", "balance"],
    "seed=-1": ["seed", "-1"],
    "launcher.accelerator=warp": ["launcher", "warp"],
    "callbacks.checkpoint.keep=0": ["callbacks.checkpoint.keep", "at least 1", "0"],
    "attention=mha,mla": ["attention=mha,mla", "-m"],
    "trainer.max_steps": ["trainer.max_steps", "key=value"],
    "--cgf=job": ["--cgf", "--cfg"],
}


@pytest.mark.parametrize("option", [*MODEL, *SETTINGS])
def test_a_wrong_option(option: str, refused) -> None:
    message = refused(*option.split(" ") if option in MODEL else [option])
    for words in (MODEL | SETTINGS)[option]:
        assert words in message


def test_a_wrong_path(refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    here = ("empty", "latin.txt")
    for option, words in (
        ("data.path=nowhere", ["data.path", "nowhere"]),
        ("data.path=null", ["data.path", "None"]),
        ("data.path=empty", ["data.path", "empty"]),
        ("data.path=latin.txt", ["latin.txt", "UTF-8", "2", "data.errors=replace"]),
        ("ckpt_path=nowhere", ["ckpt_path", "nowhere", "run folder"]),
        ("init_from=nowhere", ["init_from", "nowhere", "run folder"]),
    ):
        message = refused(option, here=here)
        for word in words:
            assert word in message, message


def test_a_folder_that_holds_another_run(refused, made: Path) -> None:
    message = refused(f"hydra.run.dir={made / 'run'}", f"run_dir={made / 'run'}")
    assert "hydra.run.dir" in message and "another run" in message and "ckpt_path=" in message


def test_a_wrong_checkpoint(refused, made: Path, tmp_path: Path) -> None:
    whole = find_checkpoint(made / "run").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    here = ("half.pt",)
    assert "truncated" in refused("ckpt_path=half.pt", here=here)
    said = {
        "ckpt_path": ("a resumed run must not change", "a resumed run must not change: tokenizer is one of"),
        "init_from": ("of another architecture", "its vocabulary is another: 257 tokens"),
    }
    for field, (other, vocabulary) in said.items():
        start = f"{field}={made / 'run'}"
        message = refused(start, "attention=mla", here=here)
        assert f"{field}: {other}: layout is 'mha' there and 'mla' here" in message
        message = refused(start, "tokenizer=bpe", "tokenizer.vocab_size=300", here=here)
        assert f"{field}: {vocabulary}" in message


class NoLongerThan(Stage):
    """Refuses what lies beyond a table of positions."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple:
        if q.shape[2] > call.site.max_len:
            raise ValueError(
                f"data.seq_len: must be at most max_seq_len={call.site.max_len}, got {q.shape[2]}"
            )
        return q, k, v


def test_a_length_over_a_variants_maximum(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    attnzoo.list_variants()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @attnzoo.register(attnzoo.Card("short", "Short", "test", "Has a fixed maximum."))
    def short(draft: Draft) -> None:
        draft.put("refine", NoLongerThan())

    message = refused("attention=short", "model.max_seq_len=16")
    assert "data.seq_len" in message and "max_seq_len=16" in message and "32" in message


def test_the_stack_trace_comes_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNZOO_TRACEBACK", "1")
    assert main(["train", "attention=mlla"]) == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: attention: no choice 'mlla'")


@pytest.mark.parametrize(
    "arguments",
    [
        ["lst"],
        [],
        ["show", "mlla"],
        ["list", "zz*"],
        ["generate", "nowhere"],
        ["generate", "nowhere", "--prompt", "a"],
        ["show", "mla", "--dim", "x"],
    ],
)
def test_other_commands_report_in_one_line_too(arguments: list[str], capfd: pytest.CaptureFixture) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_disk_that_fills_up_while_training(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def fsync(file: int) -> None:
        if list((tmp_path / "run" / "checkpoints").glob(".step-00000004*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    options = (f"hydra.run.dir={tmp_path / 'run'}", "callbacks.checkpoint.every=2")
    assert main(["train", *overrides(made, *options)]) == 1
    err = capfd.readouterr().err
    assert err.startswith("error: checkpoint of step 4: the disk is full; the last good one is")
    assert err.count("\n") == 1 and "step-00000002.pt" in err and "ckpt_path" in err
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 2
    assert main(["train", *overrides(made, *options, f"ckpt_path={tmp_path / 'run'}")]) == 0
