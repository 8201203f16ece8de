"""A data worker that dies or hangs ends the run with a line that names it; the checkpoint before stays."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch.utils.data

from attnzoo.data.text import TextCorpus
from attnzoo.parallel.pulse import Pulse
from attnzoo.train import store
from attnzoo.train.batches import CounterBatches, Loader
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.failure import explain
from children import Child, group, until
from faults import before, cli, one_line, strike, train_command

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def trains(fault: str, arguments: list[str]) -> None:
    """A run whose worker 1 is hit when it is to read sample 60, of step 16."""

    def hit(corpus: TextCorpus, n: int) -> None:
        if torch.utils.data.get_worker_info() and n == 60:
            strike(fault, OSError("the disk is on fire"))

    before(TextCorpus, "sample", hit)
    cli(*arguments)


def trains_and_saves(arguments: list[str]) -> None:
    """A run whose worker 1 dies while the bytes of the 6th checkpoint are being written."""
    workers, writes = multiprocessing.active_children, []

    def hit(watched: object, data: bytes) -> None:
        writes.append(watched)
        if len(set(writes)) == 6 and writes.count(watched) == 5 and len(workers()) == 2:
            workers()[1].kill()
            time.sleep(30)  # torch raises in here

    before(store._Watched, "write", hit)
    cli(*arguments)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", ("data worker 1 of 2", "was killed by SIGKILL", "data.num_workers=0")),
        ("hangs", ("data worker 1 of 2", "hangs: no batch for 10 s", "data.worker_timeout")),
        ("raises", ("data worker 1", "OSError: the disk is on fire")),
    ],
)
def test_a_worker(tmp_path: Path, fault: str, words: tuple[str, ...]) -> None:
    options = ("data.num_workers=2", "data.worker_timeout=10", "callbacks.checkpoint.every=1")
    child = Child(trains, fault, train_command(tmp_path, "trainer.max_steps=50", *options), cwd=tmp_path)
    until(lambda: not child.alive)
    until(lambda: not group(child.pid), 5)  # before `wait` kills what is left
    ended = child.wait()
    assert ended.returncode == 1, ended.stderr
    line = one_line(ended.stderr)
    for word in (*words, "before samples ", "was the last read", f"ckpt_path={tmp_path / 'run'}"):
        assert word in line
    done = read_checkpoint(tmp_path / "run")["progress"]["step"]
    # workers read ahead, and of a death the run hears at once
    assert 5 <= done <= 15 and f"step-{done:08d}" in line


def test_a_worker_that_dies_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """What torch raises then comes out of the writing, which turns it into an error of its own."""
    options = ("data.num_workers=2", "callbacks.checkpoint.every=1")
    ended = Child(
        trains_and_saves, train_command(tmp_path, "trainer.max_steps=50", *options), cwd=tmp_path
    ).wait()
    assert ended.returncode == 1, ended.stderr
    line = one_line(ended.stderr)
    for word in ("of 2", "was killed by SIGKILL", "was the last read", f"ckpt_path={tmp_path / 'run'}"):
        assert word in line
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 5 and "step-00000005" in line
    assert not list((tmp_path / "run" / "checkpoints").glob(".*.tmp"))


def test_a_death_that_turned_into_another_error_is_still_told(tmp_path: Path) -> None:
    loader = Loader(
        range(1000), CounterBatches(0, None, batch_size=2), num_workers=1, persistent_workers=True
    )
    next(iter(loader))
    with pytest.raises(RuntimeError, match="DataLoader") as death:
        loader._source._workers[0].kill()
        time.sleep(30)  # torch raises in here
    other = ValueError("a library's own words")
    other.__context__, death.value.__context__ = death.value, other  # a circle, as a library may leave it
    for error in (death.value, other):
        told = explain(error, tmp_path, loader, Pulse(0, 1, timeout=1.0), step=7)
        assert "step 7: data worker 0 of 1" in str(told) and "SIGKILL" in str(told)
    own = ValueError("not of a worker")
    own.__cause__ = own
    assert explain(own, tmp_path, loader, Pulse(0, 1, timeout=1.0), step=7) is own
    loader.end()


def test_a_worker_is_not_taken_for_a_rank(tmp_path: Path) -> None:
    """Of several ranks, whose lost connection is told by time-outs too; and before any worker is known."""
    loader = Loader(range(1000), CounterBatches(0, None, batch_size=2), num_workers=1)
    for death in ("DataLoader timed out after 2 seconds", "DataLoader worker (pid 7) is killed by signal"):
        told = str(explain(RuntimeError(death), tmp_path, loader, Pulse(0, 2, timeout=1.0), step=1))
        assert "step 1: a data worker died at its start" in told and "data.num_workers=0" in told
    lost = RuntimeError("Connection closed by peer")
    assert "ranks did not all connect" in str(
        explain(lost, tmp_path, loader, Pulse(0, 2, timeout=1.0), step=1)
    )
