"""Two processes train what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnzoo.train.checkpoint import read_checkpoint
from runs import metrics, overrides, train


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
