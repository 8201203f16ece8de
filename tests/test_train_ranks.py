"""Two processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from attnzoo.train import callbacks
from attnzoo.train.checkpoint import read_checkpoint
from children import start_ranks
from exact_resume import same_tree
from runs import metrics, overrides, train, write_text


@pytest.mark.multi
@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    options = ("data.isolate=true", "trainer.val_every=2")
    _, alone = train(tmp_path, *options, name="one")
    spread = ("launcher.devices=2", "launcher.accelerator=cpu", "launcher.strategy=ddp")
    program = tmp_path / "program.py"
    program.write_text("import sys\nfrom attnzoo.cli import main\nsys.exit(main())\n")
    command = [sys.executable, str(program), "train", *overrides(tmp_path, *options, *spread)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    folder = tmp_path / "two"
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    both = json.loads((folder / "summary.json").read_text())
    assert both["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-5) and both["tokens"] == alone["tokens"]
    for one, two in zip(metrics(tmp_path / "one"), metrics(folder), strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    first, second = (read_checkpoint(path)["model"] for path in (tmp_path / "one", folder))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def writes_slowly(folder: Path, *options: str) -> None:
    """A rank of a run that has done further steps before its last checkpoint is written."""
    save = callbacks.save_checkpoint

    def slow(*args: object) -> None:
        time.sleep(0.5)
        save(*args)

    callbacks.save_checkpoint = slow
    train(folder, *options, name=folder.name)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_writing_in_the_background_changes_nothing(tmp_path: Path, strategy: str) -> None:
    options = ("launcher.devices=2", "launcher.accelerator=cpu", f"launcher.strategy={strategy}")
    options += ("callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=9", "attention=moh")
    for name in ("false", "true"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").symlink_to(write_text(tmp_path))
        ranks = start_ranks(
            writes_slowly, tmp_path / name, *options, f"callbacks.checkpoint.background={name}", cwd=tmp_path
        )
        for rank in ranks:
            ended = rank.wait()
            assert ended.returncode == 0, ended.stderr
    for step in (2, 4):
        plain, background = (
            read_checkpoint(tmp_path / name / name / "checkpoints" / f"step-{step:08d}.pt")
            for name in ("false", "true")
        )
        for part in ("model", "optimizer", "position", "draws", "identity"):
            assert same_tree(plain[part], background[part]), part
        assert plain["progress"]["step"] == background["progress"]["step"] == step
