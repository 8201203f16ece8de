"""Signals that reach `attnzoo train` within a step: a checkpoint, and an exit code that says which it was."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from attnzoo.train.checkpoint import read_checkpoint
from children import run_child, start_ranks
from runs import metrics, overrides

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
LEFT = 3  # steps done when the signal comes in the second micro-batch of the third
SPREAD = ("launcher.devices=2", "launcher.strategy=ddp", "launcher.accelerator=cpu")


def command(folder: Path, *more: str) -> list[str]:
    return ["train", *overrides(folder, "trainer.accumulate=2"), f"hydra.run.dir={folder / 'run'}", *more]


def trains(number: int, victim: int, arguments: list[str]) -> None:
    """`attnzoo train`, whose rank ``victim`` sends itself a signal; 0 for none."""
    from attnzoo.cli import main
    from attnzoo.train.module import LanguageModule

    training_step = LanguageModule.training_step

    def step(module: LanguageModule, batch: object, batch_idx: int) -> object:
        if number and batch_idx == 2 * LEFT - 1 and int(os.environ.get("RANK", "0")) == victim:
            os.kill(os.getpid(), number)
        return training_step(module, batch, batch_idx)

    LanguageModule.training_step = step
    sys.exit(main(arguments))


def check_stopped(folder: Path, number: signal.Signals) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["stopped_by"], summary["steps"]) == ("stopped", number.name, LEFT)
    assert read_checkpoint(folder)["progress"]["step"] == LEFT
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]


@pytest.mark.multi
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in list(CODES)[1:])]
)
def test_a_signal_in_a_step(tmp_path: Path, number: signal.Signals) -> None:
    ended = run_child(trains, number, 0, command(tmp_path), cwd=tmp_path)
    assert ended.returncode == CODES[number], ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "stopped at step 3; go on with ckpt_path=run"
    check_stopped(tmp_path / "run", number)
    on = command(tmp_path, "ckpt_path=run")
    ended = run_child(trains, 0, 0, on, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize(("number", "victim"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_rank_stops_both(tmp_path: Path, number: signal.Signals, victim: int) -> None:
    ranks = start_ranks(trains, number, victim, command(tmp_path, *SPREAD), cwd=tmp_path)
    ended = [rank.wait() for rank in ranks]
    assert [end.returncode for end in ended] == [CODES[number]] * 2, ended
    check_stopped(tmp_path / "run", number)
