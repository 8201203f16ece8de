"""A rank that dies, hangs or fails: the others end within the time-out and say which one it was.

With gloo. NCCL gets the same time-out, and ends a process by its own watchdog; that is not tested here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        ("hangs", 1, "rank 1 of 2: no answer within 20 s, it hangs or died (last seen in step "),
        ("fails", 1, "rank 1 of 2 left: out of tea"),
        ("dies", 0, "rank 0, or the launcher, is gone: it died or left"),
    ],
)
def test_a_rank(tmp_path: Path, fault: str, victim: int, words: str) -> None:
    options = (
        "launcher.devices=2",
        "launcher.strategy=ddp",
        "launcher.accelerator=cpu",
        "launcher.timeout=20",  # all that one of them may take longer to begin, too
    )
    arguments = train_command(tmp_path, *options, "callbacks.checkpoint.every=2", "trainer.max_steps=20")
    ranks = start_ranks(trains, fault, victim, arguments, cwd=tmp_path)
    other = ranks[1 - victim]
    until(lambda: not other.alive)
    assert fault != "hangs" or ranks[victim].alive
    assert group(other.pid) == []
    ended = other.wait()
    ranks[victim].kill_group()
    assert ended.returncode == 1, ended.stderr
    line = one_line(ended.stderr)
    assert "step 7: " in line and words in line and f"ckpt_path={tmp_path / 'run'}" in line
    assert "step-00000006" in line and read_checkpoint(tmp_path / "run")["progress"]["step"] == 6


OWN = ("launcher.devices=2", "launcher.strategy=ddp", "launcher.accelerator=cpu")
# seconds that a rank waits for the other, which has Python and torch to load first: many on a busy machine
WAITS = 60
PATIENCE = 300.0  # seconds; a failed test takes that long, a passed one never does
MARK = "busy"  # a file in which a rank that is busy tells its process
# the program of both ranks, the second of which is busy with itself from a moment on, and asks nobody
BUSY = f"""
import os, sys, time
from pathlib import Path
from attnzoo.cli import main
from attnzoo.train import run
from attnzoo.train.module import LanguageModule

def tell():
    Path("{MARK}.new").write_text(str(os.getpid()))
    os.replace("{MARK}.new", "{MARK}")

def work(*args):
    tell()
    time.sleep(1000)

def late(trainer):
    parent = os.getppid()
    tell()
    while os.getppid() == parent:
        time.sleep(0.01)
    adopt(trainer)
    time.sleep(1000)

adopt = run.adopt
if os.environ.get("LOCAL_RANK") == "1":
    if os.environ["MOMENT"] == "step":
        LanguageModule.training_step = work
    else:
        run.adopt = late
sys.exit(main())
"""


@contextmanager
def started(folder: Path, program: list[str], waits: float, **more: str) -> Iterator[subprocess.Popen]:
    """A program that starts the second rank itself; it leads a group, which is ended with it."""
    paths = os.pathsep.join(filter(None, sys.path))
    mine = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = (
        *OWN,
        f"launcher.timeout={waits:g}",
        "callbacks.checkpoint.every=2",
        "trainer.max_steps=100000",
    )
    with open(folder / "said", "wb") as said:
        parent = subprocess.Popen(
            [sys.executable, *program, *train_command(folder, *options)],
            cwd=folder,
            env=os.environ | mine | more,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
    try:
        yield parent
    finally:
        with suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


@pytest.mark.parametrize("fault", ["dies", "stops"])
def test_a_rank_that_the_run_started_itself(tmp_path: Path, fault: str) -> None:
    # the other rank's program is that of this one, which must be a script
    with started(tmp_path, ["-m", "attnzoo.cli"], PATIENCE if fault == "dies" else WAITS) as parent:
        until(
            lambda: parent.poll() is not None or (tmp_path / "run" / "checkpoints" / "last").exists(),
            PATIENCE,
        )
        (child,) = (pid for pid in group(parent.pid) if pid != parent.pid)
        os.kill(child, signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
        assert parent.wait(PATIENCE - 1) == 1
        until(lambda: not group(parent.pid), 5)
        line = one_line((tmp_path / "said").read_text())
        assert "rank 1 of 2" in line and f"ckpt_path={tmp_path / 'run'}" in line, line
        assert ("its process ended" if fault == "dies" else f"no answer within {WAITS} s") in line, line


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process can ask to end with its parent")
@pytest.mark.parametrize("moment", ["step", "start"])
def test_a_busy_rank_ends_with_its_parent(tmp_path: Path, moment: str) -> None:
    """It waits for nobody, so no lost connection tells it; nor does the kernel before it was asked to."""
    (tmp_path / "busy_zoo.py").write_text(BUSY)
    with started(tmp_path, ["busy_zoo.py"], PATIENCE, MOMENT=moment) as parent:
        until((tmp_path / MARK).exists, PATIENCE)
        rank = int((tmp_path / MARK).read_text())
        assert set(group(parent.pid)) == {parent.pid, rank}
        parent.kill()
        parent.wait()
        until(lambda: not group(parent.pid), 10)
