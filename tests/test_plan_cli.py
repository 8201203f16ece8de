"""`attnzoo plan`, `attnzoo train --dry-run`, and the committed table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.cli import main
from attnzoo.plan import Hardware, Job, Setup, choose, entry_for, estimate, read_hardware
from attnzoo.plan.request import VOCABULARY, read_request
from attnzoo.plan.rules import check_job
from runs import train

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
    assert main(["plan", *SMALL, *arguments]) == 0
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
        ("launcher.devices=foo", "gpus=8,64"),
        ("launcher.strategy=deepspeed", "launcher.strategy: must be one of auto, ddp, fsdp"),
        ("launcher.strategy=ddp launcher.tensor_parallel=2", "launcher.strategy: tensor_parallel and"),
        ("launcher.strategy=ddp launcher.context_parallel=2", "launcher.strategy: tensor_parallel and"),
        ("optim=muon launcher.tensor_parallel=2", "optim.name: muon needs whole matrices"),
        ("launcher.context_parallel=-2", "launcher.context_parallel: must be an integer"),
        ("launcher.tensor_parallel=0", "launcher.tensor_parallel: must be an integer"),
        ("trainer.accumulate=0", "trainer.accumulate: must be an integer"),
        ("model.dmi=3", "model.dim"),
        ("--jsn", "--json"),
    ],
)
def test_mistakes_are_one_line(argument: str, words: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", *SMALL, *argument.split()]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["trainer.aux_weights={xyz: 0.1}"],
        ["attention=moh", "trainer.aux_weights={moh/balnce: 0.1}"],
        ["attention=ccgqa", "launcher.tensor_parallel=2"],
        ["launcher.tensor_parallel=3"],
        ["attention=mtla", "launcher.context_parallel=2"],
        ["launcher.context_parallel=3"],
        ["launcher.context_parallel=4", "data.val_seq_len=1022", "data=synthetic/parity"],
        ["attention=focused_transformer", "attention.cross_batch=48"],
        ["attention=focused_transformer", "attention.cross_batch=12", "trainer.accumulate=4"],
        ["model.layout=init_from"],
        ["init_from=nothing/here"],
    ],
)
def test_what_the_trainer_refuses_is_not_planned(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Word for word."""
    monkeypatch.chdir(tmp_path)
    given, ranks = [*SMALL, "data.batch_size=48", *arguments], "launcher.devices=12"
    errors = []
    for command in (["plan", "gpus=12"], ["train", ranks], ["train", "--dry-run", ranks]):
        assert main([*command, *given]) == 2
        errors.append(capsys.readouterr().err)
    assert errors[0] == errors[1] == errors[2] and errors[0].count("\n") == 1


@pytest.mark.parametrize("field", ["seq_len", "val_seq_len"])
def test_a_length_that_a_layer_refuses_is_not_planned(field: str, monkeypatch, capsys) -> None:
    whole = Mixer.forward

    def short(self, x, ctx=None, cache=None):
        if x.shape[1] > 1024:
            raise ValueError(f"max_seq_len: must be at least the tokens, got {x.shape[1]}; raise it")
        return whole(self, x, ctx, cache)

    monkeypatch.setattr(Mixer, "forward", short)
    given = [*SMALL, "gpus=8", "data=synthetic/parity", f"data.{field}=1025", "launcher.tensor_parallel=2"]
    assert main(["plan", *given]) == 2
    assert capsys.readouterr().err.endswith("max_seq_len: must be at least the tokens, got 1025; raise it\n")


def test_blocks_that_are_alike_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    whole = Mixer.forward
    monkeypatch.setattr(Mixer, "forward", lambda self, *a: ran.append(self.site.layer) or whole(self, *a))
    options = {"vocab_size": 96, "dim": 64, "depth": 6, "num_heads": 4}
    for layout, layers in (("mha,mha,gla", [0, 2]), ("cla", [0, 1, 2, 3, 4, 5])):
        check_job(Job({"layout": layout, **options}, 64), 1, {}, ())
        assert ran == layers
        ran.clear()


FIELDS = {f.name for f in fields(Hardware)} - {"name", "source", "asynchronous"}


@pytest.mark.parametrize("value", ["foo", "-1", "", "true", "[1]", ".nan", ".inf", "{1"])
@pytest.mark.parametrize("field", sorted(FIELDS))
def test_figures_of_hardware_are_numbers(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^hardware\.{field}: .*, got ") as caught:
        changes = read_request([f"hardware.{field}={value}"]).changes
        read_hardware(HARDWARE, "h100", changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("peak_flops=H20", "or a device's name, got 'H20'; did you mean H200"),
        ("memory=80GB", "got '80GB'; give bytes"),
        ("name=x", "hardware=h100"),
        ("asynchronous=foo", "true or false, got 'foo'"),
        ("asynchronous=1", "true or false, got 1"),
        ("source=5", "text, got 5"),
        ("link=2026-13-01", "cannot be read, got '2026-13-01'"),
    ],
)
def test_other_fields_of_hardware_too(change: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^hardware\.{change.partition('=')[0]}: ") as caught:
        read_hardware(HARDWARE, "h100", read_request([f"hardware.{change}"]).changes)
    assert words in str(caught.value)


def test_a_peak_may_be_a_device_or_a_number() -> None:
    known, number = (
        read_hardware(HARDWARE, "h100", read_request([f"hardware.peak_flops={value}"]).changes)
        for value in ("A100", "312e12")
    )
    assert known.peak_flops == number.peak_flops == 312e12


def planned(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    main(["plan", *SMALL, "--json", "gpus=8", *arguments])
    return json.loads(capsys.readouterr().out)["plans"][0]


@pytest.mark.parametrize(
    "arguments",
    [
        "data.batch_size=96",
        "data.batch_size=96 trainer.accumulate=4",
        "data.batch_size=1000 trainer.accumulate=25",
        "data.seq_len=4096 data.batch_size=2",
        "data.seq_len=4096 data.batch_size=2 optim=muon",
        "data=synthetic/parity data.seq_len=4096 data.val_seq_len=4097 data.batch_size=2",
    ],
)
def test_the_trainer_takes_what_is_planned(
    arguments: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plan = planned(capsys, *arguments.split())
    assert plan["fits"]
    layout = plan["layout"]
    batch = layout["data"] * layout["rows"] * layout["accumulate"]
    given = arguments.split()
    settled = {
        "launcher.devices": 8,
        "launcher.strategy": layout["strategy"],
        "launcher.tensor_parallel": layout["tensor"],
        "launcher.context_parallel": layout["context"],
        "trainer.accumulate": layout["accumulate"],
        "data.batch_size": batch,
    }
    fixed = dict(a.split("=") for a in given)
    assert all(fixed.get(key, str(value)) == str(value) for key, value in settled.items())
    more = [f"{key}={value}" for key, value in settled.items() if key not in fixed]
    assert dry(tmp_path, monkeypatch, *SMALL, *given, *more, "hardware=h100") == 0
    ranks = (
        f"8 ranks (data {layout['data']}, context {layout['context']}, tensor {layout['tensor']}), "
        f"{layout['accumulate']} x {layout['rows']} samples"
    )
    assert ranks in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (
            "trainer.accumulate=7 data.batch_size=64",
            {
                "64 samples of a step do not divide among the groups that read them and their "
                "trainer.accumulate=7 micro-batches": 3
            },
        ),
        (
            "optim=muon data.batch_size=1 data.seq_len=4096",
            {
                "1 samples of a step do not divide among the groups that read them": 6,
                "optim.name: muon needs whole matrices, of which ranks that share heads have parts": 2,
                "8 GPUs are no multiple of tensor x context": 1,
            },
        ),
        (
            "launcher.strategy=ddp data.batch_size=4",
            {
                "4 samples of a step do not divide among the groups that read them": 1,
                "launcher.strategy: tensor_parallel and context_parallel go with fsdp": 2,
            },
        ),
    ],
)
def test_reasons_are_true(arguments: str, left_out: dict, capsys: pytest.CaptureFixture) -> None:
    """Of 1, 2 and 4 ranks that share heads, and as many that share 4096 tokens."""
    plan = planned(capsys, *arguments.split())
    assert not plan["fits"] and plan["left_out"] == left_out


@pytest.mark.parametrize("batch", [30, 96, 97])
def test_the_best_of_all_micro_batches_is_found(batch: int) -> None:
    sizes = {"layout": "mha", "vocab_size": 96, "dim": 64, "depth": 2, "num_heads": 4}
    job, hardware = Job(sizes, 64), read_hardware(HARDWARE, "h100", {"memory": 6e6})
    fixed = {"strategy": "ddp", "tensor": 1}
    every = [
        estimate(job, Setup(1, "ddp", rows=n, accumulate=batch // n, recompute=again), hardware, 0.5)
        for n in range(1, batch + 1)
        if batch % n == 0
        for again in (False, True)
    ]
    found = choose(job, 1, batch, hardware, 0.5, fixed)
    assert found.best.tokens_per_second == max(e.tokens_per_second for e in every if e.fits)
    assert sum(found.left_out.values()) == sum(not e.fits for e in every)


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
    code = main(["train", "model=debug", "--dry-run", "attention=mla", *arguments])
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


def test_a_dry_run_takes_the_architecture_of_its_start(tmp_path, monkeypatch, capsys) -> None:
    start, _ = train(tmp_path / "start", "attention=gqa")
    (tmp_path / "here").mkdir()
    assert dry(tmp_path / "here", monkeypatch, "model.layout=init_from", f"init_from={start.folder}") == 0
    assert "\ngqa: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hardware.memory=1e6"], "trainer.checkpoint_activations=true"),
        (["attention.head_dmi=3"], "head_dim"),
        (["launcher.devices=3", "hardware=h100"], "data.batch_size"),
        (["launcher.devices=foo"], "launcher.devices: must be"),
        (["launcher.devices=0"], "launcher.devices: must be"),
        (["launcher.devices=[]"], "launcher.devices: must be"),
        (["hardware.memory=80GB"], "hardware.memory: must be"),
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
