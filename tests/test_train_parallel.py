"""However ranks share a run (samples, parameters, heads, sequences), it trains what one process does.

Models are in fp64 here, so that what is left between the runs is the order of sums.
"""

from __future__ import annotations

import json
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import attnzoo
from attnzoo.cli import main
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.guard import RunFailed
from attnzoo.train.prepare import prepare
from children import run_child, start_ranks
from runs import compose, metrics, train, write_text

VARIANTS = ("mha", "gqa", "mla", "moh", "kha", "sliding_window", "linear", "gated_deltanet")
OPTIONS = {
    "gqa": ("attention.num_kv_heads=2",),
    "sliding_window": ("attention.window=5",),
    "linear": ("data.isolate=true", "attention.chunk_size=8"),
    "gated_deltanet": ("trainer.checkpoint_activations=true", "attention.chunk_size=8"),
    "mla": ("trainer.checkpoint_activations=true",),
}
# ranks, and what tells them how to share; micro-batches have one sample in all, for a loss of balance is one
# of a micro-batch
LAYOUTS = {
    "ddp": (2, "launcher.strategy=ddp", "trainer.accumulate=2"),
    "fsdp": (2, "launcher.strategy=fsdp", "trainer.accumulate=2"),
    "heads": (2, "launcher.tensor_parallel=2", "trainer.accumulate=4"),
    "sequences": (2, "launcher.context_parallel=2", "trainer.accumulate=4"),
    "fsdp, heads": (4, "launcher.tensor_parallel=2", "trainer.accumulate=2"),
    "sequences, heads": (
        *(4, "launcher.tensor_parallel=2", "launcher.context_parallel=2"),
        "trainer.accumulate=4",
    ),
}
CLOSE = 1e-9


def options(variant: str, *more: str) -> tuple[str, ...]:
    sizes = ("model.dim=32", "model.num_heads=4", "trainer.val_every=2", "launcher.accelerator=cpu")
    return (*sizes, f"attention={variant}", *OPTIONS.get(variant, ()), *more)


def train_all(folder: str, variants: tuple[str, ...], *more: str) -> None:
    """One after the other, each in a folder of its name."""
    torch.set_default_dtype(torch.float64)
    for variant in variants:
        train(Path(folder), *options(variant, *more), name=variant)


def train_compiled(*args: Any) -> None:
    """The same with blocks compiled and recomputed; traced as always, without the time that code generation
    takes."""
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    train_all(*args, "trainer.compile=true", "trainer.checkpoint_activations=true")
    assert counters["stats"]["unique_graphs"] > 0


def run_ranks(
    folder: Path, text: Path, layout: str, variants: tuple[str, ...], *more: str, work: Any = train_all
) -> None:
    ranks, *how = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    (folder / "text").symlink_to(text / "text")
    children = start_ranks(
        work, str(folder), variants, f"launcher.devices={ranks}", *how, *more, ranks=ranks, cwd=folder
    )
    for child in children:
        ended = child.wait()
        assert ended.returncode == 0, ended.stderr


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    write_text(folder)
    ended = run_child(train_all, str(folder), VARIANTS, "trainer.accumulate=4", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


def assert_same(one: Path, other: Path) -> None:
    """Losses, gradients' norms, validation, weights and the state of the optimiser."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        named = {key for key in a if key.startswith("aux/")}
        for key in named | ({"train_loss", "aux_loss", "grad_norm", "val_loss", "val_bpb"} & a.keys()):
            # the sums of losses pass through fp32 loggers of no rank: they are Python floats
            assert b[key] == pytest.approx(a[key], rel=CLOSE, abs=1e-12), (other, a["step"], key)
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert first["model"].keys() == second["model"].keys()
    for name, value in first["model"].items():
        torch.testing.assert_close(second["model"][name], value, rtol=1e-7, atol=1e-9, msg=name)
    assert first["optimizer"].keys() == second["optimizer"].keys()
    for name, entry in first["optimizer"].items():
        for key, value in entry.items():
            torch.testing.assert_close(
                second["optimizer"][name][key], value, rtol=1e-6, atol=1e-12, msg=f"{name} {key}"
            )
    places = [json.loads((f / "summary.json").read_text())["val_loss_by_position"] for f in (one, other)]
    assert places[1]["loss"] == pytest.approx(places[0]["loss"], rel=CLOSE)


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_train_what_one_does(alone: Path, tmp_path: Path, layout: str) -> None:
    variants = VARIANTS if LAYOUTS[layout][0] == 2 else ("mha", "mla", "gated_deltanet")
    run_ranks(tmp_path, alone, layout, variants)
    for variant in variants:
        assert_same(alone / variant, tmp_path / variant)


@pytest.mark.slow
@pytest.mark.multi
def test_a_run_changes_its_layout_on_the_way(alone: Path, tmp_path: Path) -> None:
    every = ("callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=2")
    run_ranks(tmp_path / "half", alone, "sequences", ("mla",), *every)
    start = tmp_path / "half" / "mla" / "checkpoints" / "step-00000002.pt"
    run_ranks(tmp_path / "on", alone, "fsdp, heads", ("mla",), f"ckpt_path={start}")
    for a, b in zip(metrics(alone / "mla")[2:], metrics(tmp_path / "on" / "mla"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=CLOSE)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=CLOSE)


SHARDED = ("callbacks.checkpoint.sharded=true", "callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=2")


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("layout", ["fsdp", "sequences, heads", "fsdp, heads"])
def test_parts_that_ranks_write_are_the_whole(alone: Path, tmp_path: Path, layout: str) -> None:
    run_ranks(tmp_path, alone, layout, ("mla", "gqa"), *SHARDED)
    for variant in ("mla", "gqa"):
        folder = tmp_path / variant / "checkpoints"
        assert {path.name for path in folder.iterdir()} == {"last", "step-00000002", "step-00000004"}
        assert_same(alone / variant, tmp_path / variant)
        model, _ = attnzoo.load(tmp_path / variant)
        saved = read_checkpoint(folder)["model"]
        assert all(torch.equal(p, saved[name].to(p)) for name, p in model.state_dict().items())
    start = tmp_path / "mla" / "checkpoints" / "step-00000002"
    run_ranks(tmp_path / "on", alone, "sequences", ("mla",), f"ckpt_path={start}", *SHARDED)
    for a, b in zip(metrics(alone / "mla")[2:], metrics(tmp_path / "on" / "mla"), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=CLOSE)


def by_two(folder: str, strategy: str, sharded: str) -> None:
    options = ("model.tie_head=true", "launcher.accelerator=cpu", "launcher.devices=2", "trainer.max_steps=1")
    more = (f"launcher.strategy={strategy}", f"callbacks.checkpoint.sharded={sharded}")
    train(Path(folder), *options, *more, name=f"{strategy}-{sharded}")


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize(("strategy", "sharded"), [("fsdp", "true"), ("fsdp", "false"), ("ddp", "true")])
def test_tied_weights_are_kept_once(tmp_path: Path, strategy: str, sharded: str) -> None:
    write_text(tmp_path)
    for child in start_ranks(by_two, str(tmp_path), strategy, sharded, ranks=2, cwd=tmp_path):
        ended = child.wait()
        assert ended.returncode == 0, ended.stderr
    run, out = tmp_path / f"{strategy}-{sharded}", tmp_path / "out"
    saved = read_checkpoint(run)["model"]
    assert saved["head.weight"].data_ptr() == saved["embed.weight"].data_ptr()
    assert main(["export", str(run), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["shared"] == {"head.weight": "embed.weight"}
    train(tmp_path, "model.tie_head=true", "trainer.max_steps=2", f"ckpt_path={run}", name="on")


def test_shards_that_cannot_be_written_fail_the_run(tmp_path: Path) -> None:
    with (
        mock.patch("attnzoo.train.sharded.write_checked", side_effect=OSError(28, "No space left on device")),
        pytest.raises(RunFailed, match=r"checkpoint of step 2: the disk is full; there is none"),
    ):
        train(tmp_path, *SHARDED, "trainer.max_steps=2")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_folder_of_shards_is_verified(tmp_path: Path) -> None:
    train(tmp_path, *SHARDED)
    train(tmp_path, name="file")
    folder = tmp_path / "run" / "checkpoints"
    whole, parts = read_checkpoint(tmp_path / "file"), read_checkpoint(folder)
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())
    shard = folder / "step-00000004" / "rank-00000.pt"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"rank-00000\.pt differs from its checksum.*step-00000002"):
        read_checkpoint(folder)
    assert read_checkpoint(folder / "step-00000002")["progress"]["step"] == 2
    (folder / "step-00000002" / "rank-00000.pt").unlink()
    with pytest.raises(ValueError, match=r"rank-00000\.pt differs"):
        read_checkpoint(folder / "step-00000002")
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.background"):
        train(tmp_path, *SHARDED, "callbacks.checkpoint.background=true", name="both")


@pytest.mark.parametrize(
    ("given", "words"),
    {
        ("launcher.tensor_parallel=2", "launcher.strategy=ddp"): ["launcher.strategy", "fsdp", "'ddp'"],
        ("launcher.tensor_parallel=0",): ["launcher.tensor_parallel", "at least 1", "0"],
        ("launcher.tensr_parallel=2",): ["launcher.tensr_parallel", "tensor_parallel"],
        ("launcher.context_parallel=3", "launcher.devices=3"): [
            "data.seq_len",
            "32",
            "launcher.context_parallel=3",
        ],
        ("launcher.context_parallel=2", "launcher.devices=2", "attention=mtla"): [
            "launcher.context_parallel",
            "mtla",
        ],
        ("launcher.tensor_parallel=2", "launcher.devices=2", "attention=dcmha"): [
            "launcher.tensor_parallel",
            "dcmha",
        ],
        ("launcher.tensor_parallel=2", "optim=muon"): ["optim.name", "muon", "launcher.tensor_parallel=2"],
        ("launcher.timeout=0",): ["launcher.timeout", "0"],
    }.items(),
)
def test_what_cannot_be_shared_is_said_at_the_start(
    tmp_path: Path, given: tuple[str, ...], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        prepare(compose(tmp_path, *(f"+{o}" if "tensr" in o else o for o in given)))
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.multi
@pytest.mark.parametrize("layout", ["fsdp", "heads", "sequences"])
def test_ranks_compile_and_recompute(alone: Path, tmp_path: Path, layout: str) -> None:
    variants = ("mha", "moh", "gated_deltanet")
    run_ranks(tmp_path, alone, layout, variants, work=train_compiled)
    for variant in variants:
        assert_same(alone / variant, tmp_path / variant)
