"""A rank that dies, hangs or fails: the others end within the time-out and say which one it was.

With gloo. NCCL gets the same time-out, and ends a process by its own watchdog; that is not tested here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.guard import RunFailed
from children import group, start_ranks, until
from faults import before, cli, one_line, strike, train_command

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def trains(fault: str, victim: int, arguments: list[str]) -> None:
    """A rank of a run; the victim is hit in step 7."""
    from attnzoo.train.module import LanguageModule

    def hit(module: LanguageModule, *args: object) -> None:
        if int(os.environ["RANK"]) == victim and module.progress.step == 6:
            strike(fault, RunFailed("out of tea"))

    before(LanguageModule, "training_step", hit)
    cli(*arguments)


@pytest.mark.parametrize(
    ("fault", "victim", "words"),
    [
        ("dies", 1, "rank 1 of 2: its process ended (last seen in step "),
        ("hangs", 1, "rank 1 of 2: no answer within 6 s, it hangs or died (last seen in step "),
        ("fails", 1, "rank 1 of 2 left: out of tea"),
        ("dies", 0, "rank 0, or the launcher, is gone: it died or left"),
    ],
)
def test_a_rank(tmp_path: Path, fault: str, victim: int, words: str) -> None:
    options = (
        "launcher.devices=2",
        "launcher.strategy=ddp",
        "launcher.accelerator=cpu",
        "launcher.timeout=6",
    )
    arguments = train_command(tmp_path, *options, "callbacks.checkpoint.every=2", "trainer.max_steps=20")
    ranks = start_ranks(trains, fault, victim, arguments, cwd=tmp_path)
    other = ranks[1 - victim]
    until(lambda: not other.alive, 60)
    assert fault != "hangs" or ranks[victim].alive
    assert group(other.pid) == []
    ended = other.wait()
    ranks[victim].kill_group()
    assert ended.returncode == 1, ended.stderr
    line = one_line(ended.stderr)
    assert "step 7: " in line and words in line and f"ckpt_path={tmp_path / 'run'}" in line
    assert "step-00000006" in line and read_checkpoint(tmp_path / "run")["progress"]["step"] == 6


OWN = ("launcher.devices=2", "launcher.strategy=ddp", "launcher.accelerator=cpu", "launcher.timeout=10")


@pytest.mark.parametrize("victim", ["child", "stopped child", "parent"])
def test_ranks_that_the_run_started_itself(tmp_path: Path, victim: str) -> None:
    """One process starts the other: neither outlives the other, whichever dies."""
    options = (*OWN, "callbacks.checkpoint.every=2", "trainer.max_steps=100000")
    # the other rank's program is that of this one, which must be a script
    command = [sys.executable, "-m", "attnzoo.cli", *train_command(tmp_path, *options)]
    paths = os.pathsep.join(filter(None, sys.path))
    with open(tmp_path / "said", "wb") as said:
        parent = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        until((tmp_path / "run" / "checkpoints" / "last").exists, 90)
        (child,) = (pid for pid in group(parent.pid) if pid != parent.pid)
        if victim == "parent":
            parent.kill()
            until(lambda: not group(parent.pid), 5)
            return
        os.kill(child, signal.SIGKILL if victim == "child" else signal.SIGSTOP)
        assert parent.wait(10 + 15) == 1
        until(lambda: not group(parent.pid), 5)
        line = one_line((tmp_path / "said").read_text())
        assert "rank 1 of 2" in line and f"ckpt_path={tmp_path / 'run'}" in line, line
        assert ("its process ended" if victim == "child" else "no answer within 10 s") in line, line
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()
