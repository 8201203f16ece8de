"""A run that is killed between its last checkpoint and its summary is trained: only the rest is done."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from attnzoo.sweep import cell as cell_process
from attnzoo.sweep.manifest import Manifest, write_manifest
from attnzoo.sweep.plan import plan
from attnzoo.sweep.request import read_request
from attnzoo.sweep.state import completed
from attnzoo.train import callbacks, run, store
from attnzoo.train.module import LanguageModule
from children import run_child, start_ranks
from runs import metrics, overrides, train

TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes", "versions")
MOMENTS = ("settled", "closing", "decoding", "naming")
RAISED = "trainer.max_steps: the checkpoint is at 4, got 4; raise it"


def arm(moment: str) -> None:
    """Make this process kill itself after the last checkpoint, as far towards the summary as ``moment``."""

    def die(*args: Any, **more: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def rename(source: Any, goal: Any) -> None:
        if Path(goal).name == "summary.json":
            die()
        replace(source, goal)

    if moment == "settled":
        callbacks.Checkpoint.on_train_end = die
    elif moment == "closing":
        run._close_folder = die
    elif moment == "decoding":
        run.decode_summary = die
    elif moment == "naming":
        store.os.replace = rename


def trains(folder: Path, moment: str, *options: str) -> None:
    arm(moment)
    train(folder, *options)


def goes_on(folder: Path, *options: str) -> None:
    """Resume where no step may be trained any more."""

    def no(*args: Any) -> None:
        raise AssertionError("a step was trained")

    LanguageModule.training_step = no
    train(folder, *options, f"ckpt_path={folder / 'run'}")


def commands(*arguments: str) -> None:
    from attnzoo.cli import main

    sys.exit(main(list(arguments)))


def trains_cell(folder: str, cell: str, moment: str) -> None:
    arm(moment)
    raise SystemExit(cell_process.main([folder, cell]))


def summary(folder: Path) -> dict[str, Any]:
    """Without what a clock decides."""
    content = json.loads((folder / "summary.json").read_text())
    decode = content["decode"] and {key: content["decode"][key] for key in ("context", "cache_bytes")}
    return {key: value for key, value in content.items() if key not in TIMES} | {"decode": decode}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder)
    return folder / "run"


@pytest.mark.multi
@pytest.mark.parametrize(
    "moment", [MOMENTS[0], *(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS[1:])]
)
def test_a_trained_run_is_only_closed(tmp_path: Path, undisturbed: Path, moment: str) -> None:
    killed = run_child(trains, tmp_path, moment, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "summary.json").exists()
    weights = (tmp_path / "run" / "checkpoints" / "step-00000004.pt").read_bytes()
    ended = run_child(goes_on, tmp_path, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert summary(tmp_path / "run") == summary(undisturbed)
    assert summary(undisturbed)["val_bpb"] > 0 and summary(undisturbed)["decode"]["context"]
    last = metrics(tmp_path / "run")[-1]
    content = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert content["seconds"] == last["seconds"] and content["tokens_per_second"] == last["tokens_per_second"]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004.pt").read_bytes() == weights
    with pytest.raises(ValueError, match=re.escape(RAISED)):
        train(tmp_path, f"ckpt_path={tmp_path / 'run'}")


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_close_together(tmp_path: Path, strategy: str) -> None:
    options = (f"launcher.strategy={strategy}", "launcher.devices=2", "launcher.accelerator=cpu")
    for name in ("straight", "killed"):
        (tmp_path / name).mkdir()
    for child in start_ranks(trains, tmp_path / "straight", "", *options):
        assert child.wait().returncode == 0
    codes = {
        child.wait().returncode for child in start_ranks(trains, tmp_path / "killed", "settled", *options)
    }
    assert codes == {-signal.SIGKILL}
    for child in start_ranks(goes_on, tmp_path / "killed", *options):
        ended = child.wait()
        assert ended.returncode == 0, ended.stderr
    assert summary(tmp_path / "killed" / "run") == summary(tmp_path / "straight" / "run")


def test_what_is_missing_is_the_end_of_the_same_run_only(tmp_path: Path) -> None:
    options = ("trainer.max_steps=2", "trainer.decode_tokens=0")
    train(tmp_path, *options)
    file, resume = tmp_path / "run" / "summary.json", f"ckpt_path={tmp_path / 'run'}"
    straight = summary(tmp_path / "run")
    file.unlink()
    raised = r"trainer\.max_steps: the checkpoint is at 2, got {}; raise it"
    with pytest.raises(ValueError, match=raised.format(1)):  # another length
        train(tmp_path, options[1], "trainer.max_steps=1", resume)
    with pytest.raises(ValueError, match=raised.format(2)):  # other samples, of which no validation is known
        train(tmp_path, *options, resume, "data.max_documents=30", "ckpt_force=true")
    assert not file.exists()
    train(tmp_path, *options, resume, name="other")  # it belongs to the run that it is of
    assert summary(tmp_path / "run") == straight and not (tmp_path / "other").exists()
    # of a run that was made longer after it had completed, and of one whose end failed
    for left in (straight | {"steps": 1}, straight | {"status": "failed"}):
        file.write_text(json.dumps(left))
        train(tmp_path, *options, resume)
        assert summary(tmp_path / "run") == straight


def test_a_clock_that_ran_out_is_an_end(tmp_path: Path) -> None:
    options = ("trainer.max_steps=null", "trainer.max_time=1", "trainer.decode_tokens=0")
    train(tmp_path, *options)
    straight, steps = summary(tmp_path / "run"), len(metrics(tmp_path / "run"))
    (tmp_path / "run" / "summary.json").unlink()
    train(tmp_path, *options, f"ckpt_path={tmp_path / 'run'}")
    assert summary(tmp_path / "run") == straight and straight["steps"] == steps
    with pytest.raises(ValueError, match=r"trainer\.max_time: .*raise it"):
        train(tmp_path, *options, f"ckpt_path={tmp_path / 'run'}")


@pytest.mark.multi
def test_the_command_closes_the_run_where_it_is(tmp_path: Path) -> None:
    train(tmp_path, "trainer.decode_tokens=0")
    (tmp_path / "run" / "summary.json").unlink()
    command = ["train", *overrides(tmp_path), "trainer.decode_tokens=0", "ckpt_path=run"]
    ended = run_child(commands, *command, cwd=tmp_path)
    assert ended.returncode == 0 and "run folder: run" in ended.stdout.splitlines(), (
        ended.stdout + ended.stderr
    )
    assert summary(tmp_path / "run")["status"] == "completed"
    assert len(metrics(tmp_path / "run")) == 4 and not (tmp_path / "runs").exists()
    ended = run_child(commands, *command, cwd=tmp_path)
    assert ended.returncode == 2 and ended.stderr == f"error: {RAISED}\n"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """Of one tiny run."""
    monkeypatch.chdir(tmp_path)
    manifest = plan(read_request([*overrides(tmp_path), "name=s"]))
    (manifest.folder / "cells").mkdir(parents=True)
    write_manifest(manifest)
    return manifest


@pytest.mark.multi
def test_a_trained_cell_is_only_closed(sweep: Manifest, undisturbed: Path, tmp_path: Path) -> None:
    (cell,) = sweep.cells
    killed = run_child(trains_cell, str(sweep.folder), cell.id, "closing", cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = sweep.run_folder(cell)
    before = (folder / "metrics.jsonl").read_text()
    assert not completed(sweep, cell)
    ended = run_child(trains_cell, str(sweep.folder), cell.id, "", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert completed(sweep, cell) and (folder / "metrics.jsonl").read_text() == before  # clock and all
    assert summary(folder) == summary(undisturbed)
