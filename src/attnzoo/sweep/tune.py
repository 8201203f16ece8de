"""The learning-rate search: one short comparison of rates per arm and setting, before the runs proper."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from attnzoo.sweep.manifest import RATE, RUN, SEED, TUNE, Cell, Manifest, as_cell, with_id
from attnzoo.sweep.state import DONE, FAILED, read_summary, state

FACTORS = (1 / 3, 1.0, 3.0)
Group = tuple[str, str]


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Args:
        val: validation by rate; None where the run failed.
        at_edge: the best rate is the grid's smallest or largest, so a better one may lie outside.
        tokens, flops, seconds: what all runs of the search took.
    """

    arm: str
    setting: str
    lr: float
    grid: tuple[float, ...]
    val: dict[float, float | None]
    at_edge: bool
    tokens: int
    flops: float
    seconds: float


def search_cells(
    cells: Sequence[Cell], rates: Sequence[float], seed: int | None
) -> tuple[dict[str, Any], list[Cell]]:
    """The manifest's entry for the search, and the cells of the search.

    Args:
        cells: the runs to come; one seed of each arm and setting is searched.
        rates: the grid; where it is empty, a third, one and three times the configuration's own.
        seed: of the search; None for the first that is not compared.
    """
    if seed is None:
        compared = {cell.seed for cell in cells}
        seed = next(n for n in range(1, len(compared) + 2) if n not in compared)
    firsts = {cell.group: cell for cell in reversed(cells)}
    search = []
    for cell in (firsts[group] for group in dict.fromkeys(cell.group for cell in cells)):
        around = [float(f"{factor * cell.config['optim']['lr']:.3g}") for factor in FACTORS]
        search += [_with_rate(cell, rate, seed, TUNE) for rate in sorted(rates or around)]
    every = sorted({cell.config["optim"]["lr"] for cell in search})
    return {
        "lr": every,
        "seed": seed,
        "runs": json.loads(json.dumps([asdict(cell) for cell in cells])),
    }, search


def with_chosen(manifest: Manifest) -> Manifest:
    """The manifest with the runs of every arm and setting whose search has ended; else the same object."""
    present = {cell.group for cell in manifest.cells if cell.stage == RUN}
    chosen = {(t.arm, t.setting): t.lr for t in tuned(manifest) if (t.arm, t.setting) not in present}
    if not chosen:
        return manifest
    runs = [as_cell(cell) for cell in manifest.tune["runs"]]
    new = [
        with_id(_with_rate(cell, chosen[cell.group], cell.seed, RUN)) for cell in runs if cell.group in chosen
    ]
    return replace(manifest, cells=manifest.cells + tuple(new))


def tuned(manifest: Manifest) -> list[Tuned]:
    """The searches that have ended with at least one completed run, arm by arm."""
    if not manifest.tune:
        return []
    groups = dict.fromkeys(cell.group for cell in manifest.cells if cell.stage == TUNE)
    outcomes = (_outcome(manifest, group) for group in groups)
    return [outcome for outcome in outcomes if outcome]


def untuned(manifest: Manifest) -> list[Group]:
    """Arms and settings none of whose rates completed, all having failed."""
    groups = dict.fromkeys(cell.group for cell in manifest.cells if cell.stage == TUNE)
    return [
        group
        for group in groups
        if all(state(manifest, cell).status == FAILED for cell in _searched(manifest, group))
    ]


def measure(summary: dict[str, Any]) -> float:
    """What the search minimises: bits per byte, else one minus the accuracy, else the loss."""
    if summary.get("val_bpb") is not None:
        return summary["val_bpb"]
    if summary.get("val_accuracy") is not None:
        return 1.0 - summary["val_accuracy"]
    return summary["val_loss"] if summary.get("val_loss") is not None else math.inf


def _outcome(manifest: Manifest, group: Group) -> Tuned | None:
    """The search of one arm and setting, None as long as it has not ended or if nothing completed."""
    cells = sorted(_searched(manifest, group), key=_rate)
    found = {_rate(cell): state(manifest, cell).status for cell in cells}
    if not set(found.values()) <= {DONE, FAILED} or DONE not in found.values():
        return None
    summaries = [read_summary(manifest, cell) or {} for cell in cells]
    val = {
        rate: measure(summary) if status == DONE else None
        for (rate, status), summary in zip(found.items(), summaries, strict=True)
    }
    grid = tuple(val)
    best = min((rate for rate in grid if val[rate] is not None), key=val.get)
    tokens = [summary.get("tokens") or 0 for summary in summaries]
    flops = [summary.get("train_flops_per_token") or 0.0 for summary in summaries]
    return Tuned(
        *group,
        lr=best,
        grid=grid,
        val=val,
        at_edge=len(grid) > 1 and best in (grid[0], grid[-1]),
        tokens=sum(tokens),
        flops=sum(n * each for n, each in zip(tokens, flops, strict=True)),
        seconds=sum(summary.get("seconds") or 0.0 for summary in summaries),
    )


def _rate(cell: Cell) -> float:
    return cell.config["optim"]["lr"]


def _searched(manifest: Manifest, group: Group) -> list[Cell]:
    return [cell for cell in manifest.cells if cell.stage == TUNE and cell.group == group]


def _with_rate(cell: Cell, rate: float, seed: int, stage: str) -> Cell:
    config = dict(cell.config) | {"seed": seed, "optim": dict(cell.config["optim"]) | {"lr": rate}}
    kept = tuple(o for o in cell.overrides if o.partition("=")[0] not in (RATE, SEED))
    overrides = (*kept, f"{RATE}={rate!r}", f"{SEED}={seed}")
    return replace(cell, stage=stage, seed=seed, config=config, overrides=overrides)
