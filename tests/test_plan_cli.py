"""`attnzoo plan`, `attnzoo train --dry-run`, and the committed table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import attnzoo
from attnzoo.cli import main
from attnzoo.plan import entry_for, read_hardware
from attnzoo.plan.request import VOCABULARY

ROOT = Path(__file__).parents[1]
HARDWARE = ROOT / "configs" / "hardware"
SMALL = ["model=debug", "attention=mha", "data.seq_len=1024"]


def test_a_plan_names_its_layouts_and_assumptions(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *SMALL, "gpus=2,8", "batch_tokens=32768"]) == 0
    out = capsys.readouterr().out
    assert "32 samples of 1024" in out and "60%" in out and "data sheet" in out
    assert [line.split()[0] for line in out.splitlines() if line[:1].isdigit()][:2] == ["2", "8"]


def test_json_adds_up(capsys: pytest.CaptureFixture) -> None:
    arguments = [
        "gpus=4",
        "data.batch_size=8",
        "launcher.tensor_parallel=2",
        "hardware.efficiency=0.5",
        "--json",
    ]
    assert main(["plan", *SMALL, "optim=muon", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    (plan,) = found["plans"]
    assert found["hardware"]["efficiency"] == 0.5 and found["batch"] == 8
    assert plan["layout"]["tensor"] == 2 and plan["layout"]["strategy"] == "fsdp"
    sizes, seconds = plan["memory_bytes"], plan["seconds"]
    assert sum(v for k, v in sizes.items() if k not in ("total", "lower")) == pytest.approx(sizes["total"])
    parts = {k: v for k, v in seconds.items() if not k.startswith("step") and k != "hidden"}
    assert sum(parts.values()) == pytest.approx(seconds["step"])
    assert plan["tokens_per_second"] == pytest.approx(8 * 1024 / seconds["step"])


def test_what_does_not_fit_says_why(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *SMALL, "gpus=2", "batch_tokens=8192", "hardware.memory=1e6"]) == 1
    assert "nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("hardware=h10", "h100"),
        ("hardware.effciency=1", "efficiency"),
        ("gpus=0", "gpus: must be"),
        ("overlap=2", "overlap"),
        ("launcher.devices=4", "gpus=8,64"),
        ("launcher.strategy=deepspeed", "ddp and fsdp"),
        ("model.dmi=3", "model.dim"),
        ("--jsn", "--json"),
    ],
)
def test_mistakes_are_one_line(argument: str, words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *SMALL, argument]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_entries_of_hardware_are_whole_and_found_by_name() -> None:
    for path in HARDWARE.glob("*.yaml"):
        found = read_hardware(HARDWARE, path.stem)
        assert "data sheet" in found.source and found.peak_flops > found.fp32_flops
    assert entry_for(HARDWARE, "NVIDIA H100 80GB HBM3") == "h100"
    assert entry_for(HARDWARE, "NVIDIA GeForce") is None


def test_the_7b_size_is_its_name() -> None:
    model = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / "7b.yaml"))
    with torch.device("meta"):
        built = attnzoo.create_model(**model | {"layout": "mha", "vocab_size": VOCABULARY})
    assert 6.5e9 < sum(p.numel() for p in built.parameters()) < 6.9e9


def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path / "cache"))
    code = main(["train", "model=debug", "attention=mla", *arguments, "--dry-run"])
    assert not list(tmp_path.iterdir())
    return code


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    assert dry(tmp_path, monkeypatch) == 0
    assert "nothing was trained or written" in capsys.readouterr().out
    assert (
        dry(tmp_path, monkeypatch, "hardware=h100", "launcher.devices=8", "launcher.tensor_parallel=2") == 0
    )
    out = capsys.readouterr().out
    assert "data 4, context 1, tensor 2" in out and "tokens/s" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hardware.memory=1e6"], "trainer.checkpoint_activations=true"),
        (["attention.head_dmi=3"], "head_dim"),
        (["launcher.devices=3", "hardware=h100"], "data.batch_size"),
        (["trainer.accumulate=0"], "trainer.accumulate"),
        (["-m"], "-m"),
    ],
)
def test_a_dry_run_refuses(arguments: list[str], words: str, tmp_path, monkeypatch, capsys) -> None:
    assert dry(tmp_path, monkeypatch, *arguments) == 2
    assert words in capsys.readouterr().err


def table(*arguments: str) -> int:
    command = [sys.executable, "scripts/plan_table.py", "--check", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode


def test_a_cell_of_the_committed_table_is_what_would_be_written() -> None:
    assert table("--only", "1b,mha,4096") == 0


@pytest.mark.slow
def test_the_hybrid_of_the_committed_table_is_what_would_be_written() -> None:
    assert table("--only", "7b,gated_deltanet*3,mha,32768") == 0
