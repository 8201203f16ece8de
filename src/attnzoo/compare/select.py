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
    members = group(runs, _matched_in_sweeps(runs))
    return Selection(members, left_out, _plain(members), _title(members))


def from_sweep(folder: Path) -> Selection:
    """The finished runs of a sweep; the others are left out with what is known of them.

    Raises:
        ValueError: there is no such sweep, or no run of it is usable.
    """
    from attnzoo.sweep.manifest import RUN, read_manifest

    manifest = read_manifest(folder)
    members, left_out = [], []
    for cell in manifest.cells:
        try:
            run = read_run(manifest.run_folder(cell))
        except ValueError as error:
            left_out.append(LeftOut(manifest.run_folder(cell), _why(manifest, cell, str(error))))
            continue
        if cell.stage == RUN:
            members.append(Member(run, cell.arm, cell.setting, cell.matched))
    left_out += _unplanned(manifest)
    if not members:
        raise ValueError(f"sweep {manifest.name}: no run is usable; {_reasons(left_out)}")
    refuse_twins(members)
    baseline = manifest.baseline or _plain(members)
    return Selection(
        members, left_out, baseline, f"Sweep {manifest.name}", searches(manifest), _notes(manifest)
    )


def searches(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """What the search for a learning rate tried, found and cost, by arm.

    An arm that was searched in several settings has the sum of the costs, each validation with its setting's
    name, and a rate only if it is the same in all of them.
    """
    from attnzoo.sweep.tune import tuned

    found: dict[str, list[Any]] = {}
    for one in tuned(manifest):
        found.setdefault(one.arm, []).append(one)
    return {
        arm: {
            "lr": every[0].lr if len({one.lr for one in every}) == 1 else None,
            "grid": sorted({rate for one in every for rate in one.grid}),
            "at_edge": any(one.at_edge for one in every),
            "val": {
                f"{one.setting}: {rate:g}" if len(every) > 1 else f"{rate:g}": value
                for one in every
                for rate, value in one.val.items()
            },
            **{key: sum(getattr(one, key) for one in every) for key in ("tokens", "flops", "seconds")},
        }
        for arm, every in found.items()
    }


def _plain(members: Sequence[Member]) -> str:
    """mha where it takes part, else the arm of the first run."""
    return next((m.arm for m in members if variant(m.run) == "mha"), members[0].arm)


def _reasons(left_out: Sequence[LeftOut]) -> str:
    few = "; ".join(f"{one.folder}: {one.reason}" for one in left_out[:5])
    return few + (f"; and {len(left_out) - 5} more" if len(left_out) > 5 else "")


def _why(manifest: Manifest, cell: Cell, reason: str) -> str:
    """What the sweep knows of a cell that did not end well, else what its folder shows."""
    from attnzoo.sweep.state import DONE, read_outcome

    outcome = read_outcome(manifest, cell)
    if outcome and outcome.status != DONE:
        return f"{outcome.status}: {outcome.reason}" if outcome.reason else outcome.status
    return "has not run yet" if reason == "does not exist" else reason


def _unplanned(manifest: Manifest) -> list[LeftOut]:
    """Runs that still wait for their learning rate."""
    from attnzoo.sweep.manifest import RUN, as_cell

    planned = {cell.group for cell in manifest.cells if cell.stage == RUN}
    waiting = [as_cell(cell) for cell in (manifest.tune or {}).get("runs", ())]
    groups = dict.fromkeys(cell.group for cell in waiting if cell.group not in planned)
    return [
        LeftOut(manifest.folder, f"{' '.join(filter(None, group))}: its learning rate has not been found")
        for group in groups
    ]


def _matched_in_sweeps(runs: Sequence[Run]) -> dict[str, Mapping[str, Any]]:
    """What sweeps solved for the runs that are their cells, by run folder; each manifest is read once."""
    found: dict[str, Mapping[str, Any]] = {}
    places = {run.folder: run.folder.resolve() for run in runs}
    for sweep in {place.parent.parent for place in places.values()}:
        with suppress(OSError, ValueError, KeyError, TypeError):
            cells = json.loads((sweep / "manifest.json").read_text())["cells"]
            solved = {sweep / "cells" / cell["id"]: cell["matched"] for cell in cells if cell["matched"]}
            found |= {str(folder): solved[place] for folder, place in places.items() if place in solved}
    return found


def _title(members: Sequence[Member]) -> str:
    arms = list(dict.fromkeys(member.arm for member in members))
    return ", ".join(arms) if len(arms) <= 4 else f"{len(arms)} arms"


def _notes(manifest: Manifest) -> tuple[str, ...]:
    """Cells of a local sweep share the machine unless it was told jobs=1."""
    jobs = manifest.launcher.get("jobs")
    if manifest.launcher.get("name") != "local" or jobs == 1:
        return ()
    many = f"up to {jobs}" if jobs else "as many as it holds"
    return (f"Runs shared the machine, {many} at a time: times depend on what ran beside.",)
