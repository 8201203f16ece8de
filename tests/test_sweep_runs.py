"""Sweeps on this machine: failures stay alone, and whatever is killed goes on without repeating or losing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from attnzoo.sweep import commands
from attnzoo.sweep.state import locked, read_outcome
from runs import train
from sweeps import check_two_ranks, manifest, start, statuses, steps, sweep, tiny, until

pytestmark = [pytest.mark.multi, pytest.mark.slow]
LONG = 300  # steps: some seconds, in which to be killed


def summaries(folder: Path) -> dict[str, str]:
    """The files that say which cells are done, with the time at which each was written."""
    return {
        str(f): f.read_text() + str(f.stat().st_mtime_ns) for f in folder.glob("runs/s/cells/*/summary.json")
    }


def test_a_failed_cell_stops_no_other_and_may_be_retried(tmp_path: Path) -> None:
    code, out = sweep(
        tmp_path, *tiny(tmp_path, "attention=mha,gqa", "optim.lr=1e-3,1e9", "trainer.max_steps=20")
    )
    assert code == 1
    assert statuses(tmp_path) == ["done", "failed", "done", "failed"], out
    assert out.count("is not finite") == 4 and "2 done, 2 failed" in out  # as it happened, and in the table
    before = summaries(tmp_path)
    assert sweep(tmp_path, "resume", "s")[0] == 1
    assert summaries(tmp_path) == before  # neither what is done nor what has failed is run again
    code, out = sweep(tmp_path, "retry-failed", "s", "jobs=1")
    sweep_ = manifest(tmp_path)
    assert code == 1 and [read_outcome(sweep_, cell).attempts for cell in sweep_.cells] == [1, 2, 1, 2]
    done = {file: text for file, text in before.items() if '"completed"' in text}
    assert done.items() <= summaries(tmp_path).items() and len(done) == 2
    assert sweep(tmp_path, "status", "s")[1].count("is not finite") == 2


@pytest.mark.parametrize("phase", ["planned", "started", "training"])
def test_a_killed_sweep_goes_on(tmp_path: Path, phase: str) -> None:
    arguments = tiny(tmp_path, "attention=mha,gqa", f"trainer.max_steps={LONG}", "jobs=1")
    process = start(tmp_path, *arguments)
    until((tmp_path / "runs" / "s" / "manifest.json").exists)
    first, second = manifest(tmp_path).cells
    if phase != "planned":
        until(lambda: manifest(tmp_path).lock_file(first).exists())
    if phase == "training":
        until(lambda: len(steps(tmp_path, first)) > 3)
    process.kill()
    process.wait()
    # its cell ends by itself, with a checkpoint
    until(lambda: not locked(manifest(tmp_path).lock_file(first)))
    assert len(steps(tmp_path, first)) < LONG and not steps(tmp_path, second)
    if phase == "training":
        assert statuses(tmp_path) == ["stopped", "waiting"]
        assert read_outcome(manifest(tmp_path), first).reason.startswith("at step ")
    code, out = sweep(tmp_path, "resume", "s")
    assert code == 0 and statuses(tmp_path) == ["done", "done"], out
    for cell in (first, second):
        assert steps(tmp_path, cell) == list(range(1, LONG + 1))
    if phase == "training":
        _, alone = train(tmp_path, f"trainer.max_steps={LONG}", name="alone")
        summary = json.loads((manifest(tmp_path).run_folder(first) / "summary.json").read_text())
        assert summary["val_bpb"] == alone["val_bpb"] and summary["tokens"] == alone["tokens"]


def test_a_killed_cell_is_a_failure_that_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, *tiny(tmp_path, "seed=1,2", f"trainer.max_steps={LONG}", "jobs=1"))
    until((tmp_path / "runs" / "s" / "manifest.json").exists)
    first = manifest(tmp_path).cells[0]
    until(lambda: len(steps(tmp_path, first)) > 3)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        (child,) = file.read().split()
    os.kill(int(child), signal.SIGKILL)
    assert process.wait() == 1
    assert statuses(tmp_path) == ["failed", "done"]
    assert read_outcome(manifest(tmp_path), first).reason.startswith("killed by SIGKILL")
    assert sweep(tmp_path, "retry-failed", "s")[0] == 0
    assert steps(tmp_path, first) == list(range(1, LONG + 1))  # from the start: it left no checkpoint


def test_a_cancelled_sweep_goes_on_when_resumed(tmp_path: Path) -> None:
    process = start(tmp_path, *tiny(tmp_path, "seed=1,2", f"trainer.max_steps={LONG}", "jobs=1"))
    until((tmp_path / "runs" / "s" / "manifest.json").exists)
    first = manifest(tmp_path).cells[0]
    until(lambda: len(steps(tmp_path, first)) > 3)
    with pytest.raises(ValueError, match=rf"is running \(process {process.pid}\)"):
        commands.resume(manifest(tmp_path).folder)
    commands.cancel(manifest(tmp_path).folder)
    assert process.wait() == 130
    assert statuses(tmp_path) == ["stopped", "cancelled"]
    code, out = sweep(tmp_path, "resume", "s")
    assert code == 0 and statuses(tmp_path) == ["done", "done"], out
    assert steps(tmp_path, first) == list(range(1, LONG + 1))


def test_two_ranks_are_one_run(tmp_path: Path) -> None:
    options = ("launcher.devices=2", "launcher.strategy=ddp", "launcher.accelerator=cpu", "data.isolate=true")
    code, out = sweep(tmp_path, *tiny(tmp_path, *options))
    assert code == 0, out
    check_two_ranks(tmp_path, "data.isolate=true")


def test_rates_are_searched_first(tmp_path: Path) -> None:
    search = ("tune=lr", "tune.lr=[1e-2,1e-6,1e9]", "seed=5", "trainer.max_steps=20")
    code, out = sweep(tmp_path, *tiny(tmp_path, *search))
    assert code == 0, out  # the rate that diverged only lost
    found = manifest(tmp_path)
    assert [(cell.stage, cell.seed) for cell in found.cells] == [("tune", 1)] * 3 + [("run", 5)]
    assert found.cells[-1].config["optim"]["lr"] == 1e-2
    assert statuses(tmp_path) == ["done", "done", "failed", "done"]
    assert "learning rate 0.01 of 1e-06, 0.01, 1e+09" in out
    before = summaries(tmp_path)
    assert sweep(tmp_path, "resume", "s")[0] == 0 and summaries(tmp_path) == before
