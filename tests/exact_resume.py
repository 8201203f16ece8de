"""Runs that are killed and resumed, against the same run undisturbed; for the tests and the script.

A cell is a run that is killed by SIGKILL at drawn steps, in two named phases, and resumed each time.
The covering array holds every pair of levels of two factors; a cell's two phases both count.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from children import start_ranks, until
from runs import metrics, train

# softmax, routed (with a state that changes between steps), convolution tails and a scan, the delta rule
VARIANTS = ("mha", "moh", "mamba2", "gated_deltanet")
PHASES = ("micro", "step", "epoch", "write", "validation", "twice")
FACTORS = {"variant": VARIANTS, "optimiser": ("adamw", "muon"), "processes": (1, 2), "workers": (0, 2)}
STEPS, EVERY, EDGE = 8, 2, 5  # the samples of step 5 (from 0) begin the second epoch
OPTIONS = (
    f"trainer.max_steps={STEPS}",
    "trainer.accumulate=2",
    "trainer.val_every=3",
    "trainer.decode_tokens=0",
    f"callbacks.checkpoint.every={EVERY}",
    "callbacks.checkpoint.keep=2",
    "data.max_documents=10",
    "data.val_samples=4",
    "launcher.accelerator=cpu",
)
TIMES = ("seconds", "tokens_per_second", "mfu", "peak_memory_bytes")  # what a clock or the machine decides


@dataclass(frozen=True)
class Cell:
    """A run and the two phases in which it is killed."""

    variant: str
    optimiser: str
    processes: int
    workers: int
    first: str
    second: str

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())

    @property
    def reference(self) -> str:
        """The undisturbed run: without workers, which must change nothing."""
        return f"{self.variant}-{self.optimiser}-{self.processes}"

    def options(self, workers: int) -> list[str]:
        spread = [f"launcher.devices={self.processes}", "launcher.strategy=ddp"] if self.processes > 1 else []
        chosen = [f"attention={self.variant}", f"optim={self.optimiser}", f"data.num_workers={workers}"]
        return [*OPTIONS, *chosen, *spread]

    def pairs(self) -> set[frozenset]:
        """The pairs of levels that this cell covers."""
        levels = [(name, getattr(self, name)) for name in FACTORS]
        covered = {frozenset(pair) for pair in itertools.combinations(levels, 2)}
        return covered | {frozenset((level, ("kill", phase))) for level in levels for phase in self.phases}

    @property
    def phases(self) -> tuple[str, str]:
        return self.first, self.second


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


def full_matrix() -> list[Cell]:
    """Every level with every other; the second phase of a cell goes round."""
    cells = []
    for i, (levels, phase) in enumerate(itertools.product(itertools.product(*FACTORS.values()), PHASES)):
        others = [other for other in PHASES if other != phase]
        cells.append(_cell(levels, phase, others[i % len(others)]))
    return cells


def covering_array(seed: int = 0) -> list[Cell]:
    """Few cells that cover all pairs: the best of some drawn ones, again and again."""
    draw, cells = random.Random(seed), list[Cell]()
    missing = all_pairs()
    while missing:
        drawn = [
            _cell([draw.choice(levels) for levels in FACTORS.values()], *draw.sample(PHASES, 2))
            for _ in range(400)
        ]
        cells.append(max(drawn, key=lambda cell: len(cell.pairs() & missing)))
        missing -= cells[-1].pairs()
    return cells


def all_pairs() -> set[frozenset]:
    """What a covering array must hold."""
    levels = {**FACTORS, "kill": PHASES}
    named = [[(name, level) for level in levels[name]] for name in levels]
    return {frozenset(pair) for a, b in itertools.combinations(named, 2) for pair in itertools.product(a, b)}


def _cell(levels: Any, first: str, second: str) -> Cell:
    # the edge of the epoch lies in the second half of the run
    return Cell(*levels, *((second, first) if first == "epoch" else (first, second)))


def kills(cell: Cell) -> Iterator[Kill]:
    """The kills of a cell, drawn; the first ones fall between checkpoint 2 and 4, the others after 4."""
    draw = random.Random(cell.name)
    for half, phase in enumerate(cell.phases):
        step = 2 + 2 * half + draw.randrange(2)
        moment = draw.choice(("bytes", ".pt", ".sha256", "last"))
        victims = [(0,), (0,)] if cell.processes == 1 else [(0,), (1,), (0, 1)]
        kill = Kill(phase, step, draw.choice(victims))
        if phase == "epoch":
            kill = replace(kill, step=EDGE)
        elif phase == "write":
            kill = replace(kill, step=4 + 2 * half, victims=(0,), moment=moment)
        elif phase == "validation":
            kill = replace(kill, step=3 + 3 * half)
        yield kill
        if phase == "twice":  # before the resumed run has written a checkpoint of its own
            yield kill


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train the cell through its kills; returns what differs from its reference, and the hits."""
    reference = folder / cell.reference
    if not (reference / "summary.json").exists():
        codes = _ranks(cell, folder, cell.reference, 0, None)
        assert set(codes) == {0}, codes
    hits = []
    for kill in kills(cell):
        marks = _attempt(cell, folder, kill)
        expected = {f"{kill.phase} {kill.step} {rank}" for rank in kill.victims}
        assert marks and marks <= expected, f"{cell.name}: {kill} hit {marks}"
        hits.append(f"{kill.phase}@{kill.step}{kill.moment and ':' + kill.moment}")
    codes = _ranks(cell, folder, cell.name, cell.workers, None)
    assert set(codes) == {0}, codes
    return {"hits": " ".join(hits), "differences": differences(reference, folder / cell.name)}


def _attempt(cell: Cell, folder: Path, kill: Kill) -> set[str]:
    for mark in folder.glob("mark-*"):
        mark.unlink()
    codes = _ranks(cell, folder, cell.name, cell.workers, kill)
    assert 0 not in codes, f"{cell.name}: nobody killed it: {kill}"
    return {mark.read_text() for mark in folder.glob("mark-*")}


def _ranks(cell: Cell, folder: Path, name: str, workers: int, kill: Kill | None) -> list[int]:
    """Run all ranks to their ends; where one was killed, the others are killed with it."""
    options = cell.options(workers)
    resumes = (folder / name / "checkpoints" / "last").exists()
    options += [f"ckpt_path={folder / name}"] if resumes else []
    children = start_ranks(child, folder, name, options, kill, ranks=cell.processes)
    victims = kill.victims if kill else range(cell.processes)
    until(lambda: not all(child.alive for child in children), 120.0)
    ended = [children[rank].wait() for rank in victims if not children[rank].alive or not kill]
    for other in children if kill else ():
        other.kill_group()
    ended += [other.wait() for other in children] if kill else []
    failed = [end.returncode not in ((-signal.SIGKILL,) if kill else (0,)) for end in ended]
    if any(failed):
        raise AssertionError("\n".join(end.stdout[-2000:] + end.stderr[-4000:] for end in ended))
    return [end.returncode for end in ended]


def differences(one: Path, other: Path) -> list[str]:
    """Names of weights, optimiser states and reports that are not bit for bit the same."""
    from attnzoo.train.checkpoint import read_checkpoint

    found = []
    first, second = read_checkpoint(one), read_checkpoint(other)
    for part in ("model", "optimizer"):
        a, b = _flat(first[part]), _flat(second[part])
        found += [
            f"{part}: {key}" for key in sorted(a.keys() | b.keys()) if not _same(a.get(key), b.get(key))
        ]
    for key in ("step", "tokens"):
        found += [key] if first["progress"][key] != second["progress"][key] else []
    before, after = ([_exact(line) for line in metrics(folder)] for folder in (one, other))
    found += [f"step {a['step']}: {a} {b}" for a, b in zip(before, after, strict=False) if a != b]
    return found + ([] if len(before) == len(after) == STEPS else [f"{len(before)}, {len(after)} reports"])


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _exact(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}


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
