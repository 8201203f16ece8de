"""One run that is killed again and again, at points drawn by seed, and resumed until it is done."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from children import start_ranks
from exact_resume import EVERY, OPTIONS, Kill, child, differences

PHASES = ("step", "micro", "validation", "write")


@dataclass(frozen=True)
class Killed:
    """A kill that hit: its number, phase and step, what was being written, and the checkpoint it left."""

    number: int
    phase: str
    step: int
    moment: str
    left: int


def kill_again(folder: Path, kills: int, seed: int = 0) -> Iterator[Killed]:
    """Kill a run ``kills`` times; its steps are as many as that takes, and its reference is trained last."""
    draw, steps = random.Random(seed), EVERY * (kills + 2)
    options = [*(o for o in OPTIONS if "max_steps" not in o), f"trainer.max_steps={steps}"]
    for number in range(kills):
        before = last(folder / "run")
        phase = PHASES[number] if number < len(PHASES) else draw.choice(PHASES)
        step, moment = before + draw.randrange(EVERY), ""
        if phase == "validation":  # every third step, and perhaps only after the next checkpoint
            step = (before // 3 + 1) * 3
        elif phase == "write":
            step, moment = before + EVERY, draw.choice(("bytes", ".pt", ".sha256", "last"))
        code = _attempt(folder, "run", options, Kill(phase, step, (0,), moment))
        mark = folder / "mark-0"
        assert code == -9 and mark.read_text() == f"{phase} {step} 0", (code, phase, step)
        mark.unlink()
        left = last(folder / "run")
        # a checkpoint that was complete stays, and no more than the steps since are lost
        assert left >= before and step - left <= EVERY, (before, left, step)
        yield Killed(number + 1, phase, step, moment, left)
    for name in ("run", "straight"):
        assert _attempt(folder, name, options, None) == 0


def last(run: Path) -> int:
    """The step of the checkpoint that `last` names, verified; 0 if there is none."""
    from attnzoo.train.checkpoint import read_checkpoint

    return read_checkpoint(run)["progress"]["step"] if (run / "checkpoints" / "last").exists() else 0


def compare(folder: Path) -> list[str]:
    """What differs between the killed run and its reference, but for how many reports a run has."""
    return [line for line in differences(folder / "straight", folder / "run") if "reports" not in line]


def _attempt(folder: Path, name: str, options: list[str], kill: Kill | None) -> int:
    resumes = (folder / name / "checkpoints" / "last").exists()
    if not resumes:  # killed before its first checkpoint, it starts again, as a cell of a sweep does
        shutil.rmtree(folder / name, ignore_errors=True)
    more = [f"ckpt_path={folder / name}"] if resumes else []
    (rank,) = start_ranks(child, folder, name, [*options, *more], kill, ranks=1)
    ended = rank.wait()
    assert kill or ended.returncode == 0, ended.stderr
    return ended.returncode
