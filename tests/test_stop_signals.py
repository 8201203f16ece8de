"""Signals that reach `attnzoo train` within a step: a checkpoint, and an exit code that says which it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from attnzoo.train.checkpoint import read_checkpoint
from children import Child, group, run_child, start_ranks, until
from runs import metrics, metrics_so_far, overrides

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130, signal.SIGHUP: 129}
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


def trains_with_workers(number: int, arguments: list[str]) -> None:
    """Two loader processes, which get every signal of the run, as a scheduler sends it to all of a job."""
    before = os.kill

    def to_all(pid: int, signum: int) -> None:
        os.killpg(0, signum)

    os.kill = to_all
    try:
        trains(number, 0, arguments)
    finally:
        os.kill = before


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_of_a_run(tmp_path: Path, number: signal.Signals) -> None:
    arguments = command(tmp_path, "data.num_workers=2", "trainer.max_steps=1000")
    child = Child(trains_with_workers, number, arguments, cwd=tmp_path)
    until(lambda: not child.alive)
    until(lambda: not group(child.pid), 5)  # the loader processes have ended with it
    ended = child.wait()
    assert ended.returncode == CODES[number], ended.stdout + ended.stderr
    check_stopped(tmp_path / "run", number)


def trains_as_workers_start(arguments: list[str]) -> None:
    """All processes get a signal from a loader process that has not come to ignore it; the run listens."""
    from attnzoo.train import batches, callbacks

    begin, listen, listens = batches._worker, callbacks.GracefulStop.on_train_start, Path("listens")

    def listening(*args: object) -> None:
        listen(*args)
        listens.touch()

    def worker(number: int) -> None:
        if number == 1:  # the first batch, read before the run listens, is of the other one
            until(listens.exists)
            os.killpg(0, signal.SIGTERM)
        begin(number)

    batches._worker, callbacks.GracefulStop.on_train_start = worker, listening
    trains(0, 0, arguments)


@pytest.mark.multi
def test_a_signal_while_loader_processes_start(tmp_path: Path) -> None:
    ended = run_child(trains_as_workers_start, command(tmp_path, "data.num_workers=2"), cwd=tmp_path)
    assert ended.returncode == CODES[signal.SIGTERM], ended.stdout + ended.stderr
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 1


def trains_and_hears_again(number: int, moment: str, arguments: list[str]) -> None:
    """A run that gets a signal in its third step, and once more at the ``moment`` of its end."""
    from attnzoo.train import callbacks, run

    waits, save, finish = threading.Event(), callbacks.save_checkpoint, callbacks.Writer.finish
    end_ranks, here = run.end_ranks, os.getpid()

    def late(*args: object) -> None:
        waits.wait()
        os.kill(here, number)
        save(*args)

    def waiting(writer: callbacks.Writer) -> str | None:
        if writer._thread is not None:
            waits.set()
        return finish(writer)

    def closing(trainer: object) -> None:
        os.kill(here, number)
        end_ranks(trainer)

    if moment == "written":
        callbacks.save_checkpoint, callbacks.Writer.finish = late, waiting
    else:
        run.end_ranks = closing
    trains(number, 0, arguments)


@pytest.mark.multi
@pytest.mark.parametrize("moment", ["written", "closed"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_that_comes_again(tmp_path: Path, number: signal.Signals, moment: str) -> None:
    """As from a scheduler, which asks a process and its parent: the last checkpoint is waited for."""
    arguments = command(tmp_path, "callbacks.checkpoint.background=true")
    ended = run_child(trains_and_hears_again, number, moment, arguments, cwd=tmp_path)
    assert ended.returncode == CODES[number], ended.stdout + ended.stderr
    check_stopped(tmp_path / "run", number)


@pytest.mark.multi
def test_a_terminal_that_goes(tmp_path: Path) -> None:
    """Nothing can be printed any more, and the run ends as well as by another signal."""
    ours, theirs = os.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "attnzoo.cli", *command(tmp_path, "trainer.max_steps=100000")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    )
    os.close(theirs)
    try:
        until(lambda: len(metrics_so_far(tmp_path / "run")) > 3)
        os.close(ours)
        run.send_signal(signal.SIGHUP)  # the kernel would send it to who has the terminal
        assert run.wait(60) == 129
    finally:
        run.kill()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["stopped_by"]) == ("stopped", "SIGHUP")
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == summary["steps"]
