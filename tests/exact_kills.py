"""Where a rank of a run kills itself by SIGKILL: hooks of the phases of `exact_resume`."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runs import train


@dataclass(frozen=True)
class Kill:
    """Where a process ends itself: in ``phase`` of the step after ``step`` steps, by the ranks ``victims``.

    Args:
        moment: within a write: the file whose name is not given any more, or "bytes" for the middle of one.
    """

    phase: str
    step: int
    victims: tuple[int, ...]
    moment: str = ""


def child(folder: Path, name: str, options: list[str], kill: Kill | None) -> None:
    """A rank of a run, which ends itself where it is told to."""
    torch.set_num_threads(1)
    if kill is not None and int(os.environ["RANK"]) in kill.victims:
        _arm(folder, kill)
    train(folder, *options, name=name)


def _arm(folder: Path, kill: Kill) -> None:
    """Put the hook of the phase in its place."""
    from attnzoo.train import evaluate, store
    from attnzoo.train.module import LanguageModule

    rank, here = os.environ["RANK"], {"step": 0, "micro": 0, "validating": False}

    def die() -> None:
        (folder / f"mark-{rank}").write_text(f"{kill.phase} {kill.step} {rank}")
        os.kill(os.getpid(), signal.SIGKILL)

    training_step, validate, to_device = (
        LanguageModule.training_step,
        evaluate.Validation.run,
        evaluate.to_device,
    )

    def step(self: LanguageModule, batch: Any, batch_idx: int) -> Any:
        here["step"], here["micro"] = self.progress.step, batch_idx % 2
        at_once = here["micro"] == 0 and kill.phase in ("step", "epoch", "twice")
        if here["step"] == kill.step and (at_once or (here["micro"] == 1 and kill.phase == "micro")):
            die()
        return training_step(self, batch, batch_idx)

    def validation(self: Any, *args: Any) -> Any:
        here["validating"] = here["step"] + 1 == kill.step and kill.phase == "validation"
        return validate(self, *args)

    def moved(*args: Any) -> Any:
        if here["validating"]:
            die()
        return to_device(*args)

    LanguageModule.training_step, evaluate.Validation.run, evaluate.to_device = step, validation, moved
    if kill.phase == "write":
        _arm_write(kill, store, die)


def _arm_write(kill: Kill, store: Any, die: Any) -> None:
    name, replace_, write = f"step-{kill.step:08d}.pt", os.replace, store._Watched.write
    target = {".pt": name, ".sha256": f"{name}.sha256"}.get(kill.moment, kill.moment)
    write_atomic, written, current = store.write_atomic, [], []

    def rename(source: Any, goal: Any) -> None:
        if name in str(goal):
            written.append(goal)
        # `last` is moved at every checkpoint: the one meant comes after its data
        if Path(goal).name == target and (target != "last" or written):
            die()
        replace_(source, goal)

    def atomic(path: Path, *args: Any) -> None:
        current[:] = [path.name]
        write_atomic(path, *args)

    def pour(self: Any, data: bytes) -> int:
        size = write(self, data)
        if kill.moment == "bytes" and current == [name] and self.file.tell() > 5000:
            self.file.flush()
            die()
        return size

    os.replace, store._Watched.write, store.write_atomic = rename, pour, atomic
