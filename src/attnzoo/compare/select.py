"""Where the runs of a comparison come from: folders that were named, or the cells of a sweep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnzoo.compare.arms import Member, group, refuse_twins, variant
from attnzoo.compare.runs import LeftOut, Run, read_run, read_runs

if TYPE_CHECKING:
    from attnzoo.sweep.manifest import Cell, Manifest


@dataclass(frozen=True)
class Selection:
    """The runs of a comparison.

    Args:
        baseline: the arm that the source names, or that stands to reason. title: of the report.
        tune: arm -> its search for a learning rate. notes: what a reader must know of the source.
    """

    members: list[Member]
    left_out: list[LeftOut]
    baseline: str
    title: str
    tune: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def from_folders(folders: Sequence[Path]) -> Selection:
    """Run folders in any order.

    Raises:
        ValueError: none is usable, or an arm has a seed twice.
    """
    runs, left_out = read_runs(folders)
    if not runs:
        raise ValueError(f"runs: none is usable; {_reasons(left_out)}")
    members = group(runs, {str(run.folder): m for run in runs if (m := _matched_in_sweep(run.folder))})
    plain = next((m.arm for m in members if variant(m.run) == "mha"), members[0].arm)
    return Selection(members, left_out, plain, _title(members))


def from_sweep(folder: Path) -> Selection:
    """The finished cells of a sweep; the others are left out with what is known of them.

    Raises:
        ValueError: there is no such sweep, or no cell of it is usable.
    """
    from attnzoo.sweep.manifest import read_manifest

    manifest = read_manifest(folder)
    members, left_out, searches = [], [], []
    for cell in manifest.cells:
        try:
            run = read_run(manifest.run_folder(cell))
        except ValueError as error:
            left_out.append(LeftOut(manifest.run_folder(cell), _why(folder, cell, str(error))))
            continue
        if cell.stage == "tune":
            searches.append((cell, run))
        else:
            members.append(Member(run, cell.arm, cell.setting, cell.matched))
    if not members:
        raise ValueError(f"sweep {manifest.name}: no cell is usable; {_reasons(left_out)}")
    refuse_twins(members)
    tune = {arm: _search(arm, searches, members) for arm in {cell.arm for cell, _ in searches}}
    baseline = manifest.baseline or members[0].arm
    return Selection(members, left_out, baseline, f"Sweep {manifest.name}", tune, _notes(manifest))


def _reasons(left_out: Sequence[LeftOut]) -> str:
    few = "; ".join(f"{one.folder}: {one.reason}" for one in left_out[:5])
    return few + (f"; and {len(left_out) - 5} more" if len(left_out) > 5 else "")


def _why(folder: Path, cell: Cell, reason: str) -> str:
    """What the sweep knows of a cell that did not end well, else what its folder shows."""
    with suppress(OSError, json.JSONDecodeError):
        last = json.loads((folder / "cells" / f"{cell.id}.json").read_text())
        if last["status"] != "done":
            return f"{last['status']}: {last['reason']}" if last.get("reason") else last["status"]
    return "has not run yet" if reason == "does not exist" else reason


def _matched_in_sweep(folder: Path) -> Mapping[str, Any] | None:
    """What a sweep solved for a run folder that is one of its cells."""
    manifest = folder.resolve().parents[1] / "manifest.json"
    with suppress(OSError, json.JSONDecodeError, KeyError, TypeError):
        cells = json.loads(manifest.read_text())["cells"]
        return next((c["matched"] for c in cells if c["id"] == folder.resolve().name), None)
    return None


def _title(members: Sequence[Member]) -> str:
    arms = list(dict.fromkeys(member.arm for member in members))
    return ", ".join(arms) if len(arms) <= 4 else f"{len(arms)} arms"


def _notes(manifest: Manifest) -> tuple[str, ...]:
    jobs = manifest.launcher.get("jobs")
    if isinstance(jobs, int) and jobs > 1:
        return (f"Up to {jobs} runs shared a machine: times depend on what ran beside.",)
    return ()


def _search(arm: str, searches: Sequence[tuple[Cell, Run]], members: Sequence[Member]) -> dict[str, Any]:
    """What the search for an arm's learning rate tried, found and cost."""
    own = [(cell, run) for cell, run in searches if cell.arm == arm]
    several = len({cell.setting for cell, _ in own}) > 1
    grid = sorted({run.config["optim"]["lr"] for _, run in own})
    chosen = {m.run.config["optim"]["lr"] for m in members if m.arm == arm}
    lr = chosen.pop() if len(chosen) == 1 else None
    return {
        "lr": lr,
        "grid": grid,
        "at_edge": lr is not None and len(grid) > 1 and lr in (grid[0], grid[-1]),
        "val": {
            f"{cell.setting}: {run.config['optim']['lr']:g}" if several else f"{run.config['optim']['lr']:g}":
            run.summary.get("val_loss") for cell, run in own
        },
        "tokens": sum(run.summary["tokens"] for _, run in own),
        "flops": sum(_flops(run) for _, run in own),
        "seconds": sum(run.summary.get("seconds") or 0 for _, run in own),
    }  # fmt: skip


def _flops(run: Run) -> float:
    return run.summary["tokens"] * (run.summary.get("train_flops_per_token") or 0)
