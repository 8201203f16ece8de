"""A wall clock that jumps by hours, back and forth, steers nothing: durations come from monotonic clocks."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from attnzoo.train.checkpoint import find_checkpoint
from runs import metrics, train


def test_training_does_not_look_at_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, _ = train(tmp_path, name="straight")
    wall, jumps = time.time, itertools.cycle((3 * 3600, -5 * 3600, 0))
    monkeypatch.setattr(time, "time", lambda: wall() + next(jumps))
    options = ("trainer.max_time=01:00:00", "callbacks.checkpoint.every=1", "callbacks.checkpoint.keep=2")
    run, summary = train(tmp_path, *options)
    assert summary["status"] == "completed" and summary["steps"] == 4 and 0 < summary["seconds"] < 60
    seconds = [line["seconds"] for line in metrics(tmp_path / "run")]
    assert seconds == sorted(seconds) and find_checkpoint(tmp_path / "run").name == "step-00000004.pt"
    for p, q in zip(run.model.parameters(), straight.model.parameters(), strict=True):
        assert p.equal(q)
