"""Numbers that are not finite end the run, and no checkpoint holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.guard import RunFailed
from attnzoo.train.module import LanguageModule
from runs import train


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (
            "layer",
            r"step 3: the loss is not finite, first in the output of blocks\.0.*; batch \w+, samples 8 to 11",
        ),
        ("weights", r"step 3: .*the weights of .*, before the step; batch \w+, samples 8 to 11"),
        ("after", r"step 2: the weights of .* are not finite, so no checkpoint is written"),
        ("moments", r"step 2: the optimiser's exp_avg of .* are not finite, so no checkpoint is written"),
    ],
)
def test_not_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, words: str) -> None:
    step, optimise = LanguageModule.training_step, LanguageModule.optimizer_step

    def spoil(module: LanguageModule) -> None:
        next(module.model.blocks.parameters()).data.view(-1)[0] = float("nan")

    def training_step(self: LanguageModule, *args: object) -> torch.Tensor:
        if self.progress.step == 2 and where == "layer":
            self.model.blocks[0].mlp.register_forward_hook(lambda layer, given, y: y * float("nan"))
        if self.progress.step == 2 and where == "weights":
            spoil(self)
        return step(self, *args)

    def optimizer_step(self: LanguageModule, *args: object, **more: object) -> None:
        optimise(self, *args, **more)
        if self.progress.step == 2 and where == "after":
            spoil(self)
        if self.progress.step == 2 and where == "moments":
            next(iter(self.optimizer.state.values()))["exp_avg"].view(-1)[0] = float("inf")

    monkeypatch.setattr(LanguageModule, "training_step", training_step)
    monkeypatch.setattr(LanguageModule, "optimizer_step", optimizer_step)
    with pytest.raises(RunFailed, match=words) as caught:
        train(tmp_path, "callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=9")
    assert "\n" not in str(caught.value)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.pt"))
    assert kept == [f"step-{n:08d}.pt" for n in range(1, 2 + (where in ("layer", "weights")))]
    content = read_checkpoint(tmp_path / "run")
    assert all(value.isfinite().all() for value in content["model"].values())
