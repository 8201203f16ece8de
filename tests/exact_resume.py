"""Runs that are killed and resumed, against the same run undisturbed; for the tests and the script.

A cell is a run that is killed by SIGKILL at drawn steps, in two named phases, and resumed each time.
The covering array holds every pair of levels of two factors; a cell's two phases both count.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from children import start_ranks, until
from exact_kills import Kill, child
from runs import metrics

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


def full_matrix() -> list[Cell]:
    """Every level with every other, each cell once; the second phase of a cell goes round."""
    cells: dict[Cell, None] = {}
    for i, (levels, phase) in enumerate(itertools.product(itertools.product(*FACTORS.values()), PHASES)):
        others = [other for other in PHASES if other != phase]
        drawn = (_cell(levels, phase, other) for other in others[i % 5 :] + others[: i % 5])
        cells[next(cell for cell in drawn if cell not in cells)] = None
    return list(cells)


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
    if not ended:  # not the one that was to be killed
        ended = [child.wait() for child in children if not child.alive]
    for other in children if kill else ():
        other.kill_group()
    failed = [end.returncode not in ((-signal.SIGKILL,) if kill else (0,)) for end in ended]
    # a rank that was not killed may have noticed before it could be
    ended += [other.wait() for other in children] if kill else []
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


def same_tree(a: Any, b: Any) -> bool:
    """Whether two trees of dicts and lists hold the same values, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return _same(a, b)


def _exact(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in TIMES}
