"""From a request to a manifest: cells composed, matched, checked and named; nothing is written."""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from attnzoo.sweep.check import check_cells
from attnzoo.sweep.equal import match_cells
from attnzoo.sweep.grid import expand
from attnzoo.sweep.manifest import FILE, ROOT, Cell, Manifest, with_id
from attnzoo.sweep.request import Request
from attnzoo.sweep.tune import search_cells
from attnzoo.train.settings import nearest


def plan(request: Request) -> Manifest:
    """Compose and check every cell.

    Raises:
        ValueError: a mistake in the request or in any cell, in one line; no cell has started.
    """
    now = datetime.datetime.now().astimezone()
    name = request.name or f"sweep-{now:%Y%m%d-%H%M%S}"
    folder = ROOT / name
    # hidden files are what a sweep that was killed while it wrote its manifest has left
    if folder.exists() and (not folder.is_dir() or list(folder.glob("[!.]*"))):
        way = f"attnzoo sweep resume {name}, or give" if (folder / FILE).exists() else "give"
        raise ValueError(f"name: {str(folder)!r} exists already; {way} another name")
    cells, rates = expand(request.overrides, tuned=request.tune is not None)
    _refuse_repeated(cells)
    launcher = _launcher(cells, request)
    baseline = _baseline(cells, request)
    check_cells(cells)
    match = None
    if request.match:
        match = {"budget": request.match, "by": request.by, "tolerance": request.tolerance}
        cells = match_cells(cells, baseline, match)
        check_cells(cells)
    tune = None
    if request.tune is not None:
        tune, cells = search_cells(cells, request.tune or tuple(rates), request.tune_seed)
    cells = [with_id(cell) for cell in cells]
    _refuse_equal(cells)
    return Manifest(
        folder,
        name,
        now.isoformat(timespec="seconds"),
        os.getcwd(),
        request.arguments,
        baseline,
        match,
        tune,
        launcher,
        tuple(cells),
    )


def _launcher(cells: Sequence[Cell], request: Request) -> dict[str, Any]:
    kinds = {"slurm" if "slurm" in cell.config["launcher"] else "local" for cell in cells}
    if len(kinds) > 1:
        raise ValueError("launcher: must be the same for all cells, got local and slurm; start two sweeps")
    kind = kinds.pop()
    if kind == "slurm" and request.jobs:
        raise ValueError(
            f"jobs: is for launcher=local, got {request.jobs}; use launcher.slurm.array_parallelism"
        )
    return {"name": kind, "jobs": request.jobs}


def _baseline(cells: Sequence[Cell], request: Request) -> str | None:
    """The baseline's label: as asked for; where matching needs one, mha if it is compared, else the first."""
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    if request.baseline is None:
        return None if not request.match else "mha" if "mha" in arms else arms[0]
    if request.baseline not in arms:
        raise ValueError(
            f"baseline: must be an arm of the sweep, got {request.baseline!r}; "
            f"{nearest(request.baseline, arms)}"
        )
    return request.baseline


def _refuse_repeated(cells: Sequence[Cell]) -> None:
    labels = Counter((*cell.group, cell.seed) for cell in cells)
    (arm, setting, seed), count = labels.most_common(1)[0]
    if count > 1:
        what = " ".join(filter(None, (arm, setting, f"seed={seed}")))
        raise ValueError(f"sweep: {count} cells are the same, {what}; give each value once")


def _refuse_equal(cells: Sequence[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        twin = seen.setdefault(cell.id.rpartition("-")[2] + cell.stage, cell)
        if twin is not cell:
            one, two = (" ".join(filter(None, other.group)) for other in (twin, cell))
            raise ValueError(f"sweep: {one!r} and {two!r} are the same configuration; leave one of them out")
