"""A data worker that dies or hangs ends the run with a line that names it; the checkpoint before stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.utils.data

from attnzoo.data.text import TextCorpus
from attnzoo.train.checkpoint import read_checkpoint
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


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("dies", ("data worker 1 of 2", "was killed by SIGKILL", "data.num_workers=0")),
        ("hangs", ("data worker 1 of 2", "hangs: no batch for 2 s", "data.worker_timeout")),
        ("raises", ("data worker 1", "OSError: the disk is on fire")),
    ],
)
def test_a_worker(tmp_path: Path, fault: str, words: tuple[str, ...]) -> None:
    options = ("data.num_workers=2", "data.worker_timeout=2", "callbacks.checkpoint.every=1")
    child = Child(trains, fault, train_command(tmp_path, "trainer.max_steps=50", *options), cwd=tmp_path)
    until(lambda: not child.alive, 60)
    until(lambda: not group(child.pid), 5)  # before `wait` kills what is left
    ended = child.wait()
    assert ended.returncode == 1, ended.stderr
    line = one_line(ended.stderr)
    for word in (*words, "before samples ", "was the last read", f"ckpt_path={tmp_path / 'run'}"):
        assert word in line
    done = read_checkpoint(tmp_path / "run")["progress"]["step"]
    # workers read ahead, and of a death the run hears at once
    assert 5 <= done <= 15 and f"step-{done:08d}" in line
