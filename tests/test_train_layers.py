"""What layers hear after an optimiser step: statistics over the whole step, draws that a resume repeats."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import registry
from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from runs import train

HEARD: list[tuple[int, int, float, float]] = []  # step, layer, statistic, draw


class Listener(Stage):
    """Reports the mean of its input, and notes what it is told."""

    rank = 45

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, o: Tensor, call: Call) -> Tensor:
        call.step("mean", call.x.detach().double().mean() + 100 * self.layer)
        return o

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        self.steps += 1
        HEARD.append((step, self.layer, float(stats["mean"]), float(torch.rand((), generator=generator))))


@pytest.fixture
def listening():
    """A variant that listens, for one test."""
    attnzoo.list_variants()
    before = dict(registry._entries)

    @attnzoo.register(attnzoo.Card("listening", title="Listens", family="test", summary="Listens."))
    def listening(draft: Draft) -> None:
        draft.put("combine", Listener(draft.site.layer))

    HEARD.clear()
    yield
    registry._entries.clear()
    registry._entries.update(before)


def test_statistics_are_means_over_the_micro_batches(tmp_path: Path, listening) -> None:
    heard = {}
    for accumulate in (1, 2, 4):
        HEARD.clear()
        train(tmp_path, "attention=mha", "+attention.add=listening", f"trainer.accumulate={accumulate}",
              "trainer.max_steps=3", name=f"run{accumulate}")  # fmt: skip
        heard[accumulate] = list(HEARD)
    whole = heard[1]
    assert [(step, layer) for step, layer, _, _ in whole] == [(s, i) for s in (1, 2, 3) for i in (0, 1)]
    assert all(abs(mean - 100 * layer) < 50 for _, layer, mean, _ in whole)
    for accumulate in (2, 4):
        for (step, layer, mean, draw), (*same, wanted, drawn) in zip(heard[accumulate], whole, strict=True):
            # micro-batches are equally long, so the mean of their means is the mean
            assert [step, layer] == same and abs(mean - wanted) < 1e-5 and draw == drawn


def test_a_resumed_run_hears_the_same(tmp_path: Path, listening) -> None:
    common = ("attention=mha", "+attention.add=listening", "callbacks.checkpoint.every=2")
    train(tmp_path, *common, "callbacks.checkpoint.keep=9", name="straight")
    whole = list(HEARD)
    HEARD.clear()
    half = tmp_path / "straight" / "checkpoints" / "step-00000002.pt"
    run, _ = train(tmp_path, *common, f"ckpt_path={half}", name="resumed")
    assert len(whole) == 8 and whole[4:] == HEARD
    # buffers that steps change are part of the checkpoint
    assert all(int(mixer.combine[0].steps) == 4 for mixer in run.model.mixers)


def test_without_training_nothing_is_told(listening) -> None:
    model = attnzoo.create_model("mha", vocab_size=11, dim=16, depth=2, num_heads=2, add="listening")
    model(torch.zeros(1, 3, dtype=torch.long))
    assert HEARD == []
