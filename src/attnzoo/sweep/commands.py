"""What one can do with a sweep: start, resume, retry, cancel, and look at it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from attnzoo.cli import INTERRUPTED, RUN_ERROR
from attnzoo.secure import allow_here
from attnzoo.sweep.display import Display, print_matched, print_table
from attnzoo.sweep.manifest import FILE, JOBS, ROOT, RUN, Cell, Manifest, read_manifest, write_manifest
from attnzoo.sweep.owner import LOCK, in_charge, stop_owner
from attnzoo.sweep.pool import Pool
from attnzoo.sweep.request import read_request
from attnzoo.sweep.slots import Slot, cores_here, gpus_here, ranks_of, share
from attnzoo.sweep.state import (
    CANCELLED,
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Outcome,
    attempts,
    locked,
    state,
    states,
    write_outcome,
)
from attnzoo.sweep.tune import tuned, with_chosen


def start(arguments: Sequence[str]) -> tuple[Manifest, int]:
    """Plan a sweep, write its manifest and run it; returns it and the exit code.

    Raises:
        ValueError: a mistake; nothing was written and no cell has started.
    """
    # what only looks at a sweep need not wait for the trainer's imports
    from attnzoo.sweep.check import corpora
    from attnzoo.sweep.plan import plan

    request = read_request(arguments)
    manifest = plan(request)
    if manifest.launcher["name"] == "slurm":
        from attnzoo.sweep import slurm

        slurm.check_settings(manifest)
    else:
        _slots(manifest, list(manifest.cells))
        corpora(manifest.cells)
    allow_here(name for cell in manifest.cells for name in cell.config["allow_targets"])
    write_manifest(manifest)
    print(f"{manifest.folder}: {len(manifest.cells)} cells", flush=True)
    print_matched(manifest.cells)
    try:
        return _run(manifest, request.wait)
    except ValueError:
        if not any((manifest.folder / "cells").iterdir()) and not (manifest.folder / JOBS).exists():
            shutil.rmtree(manifest.folder)  # no cell has started, so the name stays free
        raise


def resume(folder: Path, jobs: int | None = None, wait: bool = False) -> tuple[Manifest, int]:
    """Run what is neither done nor failed."""
    manifest = read_manifest(folder)
    if jobs is not None and manifest.launcher["name"] != "local":
        raise ValueError(
            f"jobs: is for launcher=local, got {jobs} for a sweep on {manifest.launcher['name']}"
        )
    if jobs is not None:
        manifest = replace(manifest, launcher=dict(manifest.launcher) | {"jobs": jobs})
    return _run(manifest, wait)


def retry_failed(folder: Path, jobs: int | None = None, wait: bool = False) -> tuple[Manifest, int]:
    """Give failed cells another attempt, from their last checkpoint if they have one, and resume."""
    manifest = read_manifest(folder)
    with in_charge(manifest):
        for cell in manifest.cells:
            if state(manifest, cell).status == FAILED:
                write_outcome(manifest, cell, Outcome(WAITING, attempts=attempts(manifest, cell)))
    return resume(folder, jobs, wait)


def cancel(folder: Path) -> Manifest:
    """Stop the running cells with a checkpoint and mark the waiting ones; `resume` goes on after it."""
    manifest = read_manifest(folder)
    if manifest.launcher["name"] == "slurm":
        from attnzoo.sweep import slurm

        slurm.cancel(manifest)
    else:
        stop_owner(manifest)
    manifest = read_manifest(folder)
    for cell in manifest.cells:
        if state(manifest, cell).status == WAITING:
            write_outcome(manifest, cell, Outcome(CANCELLED, attempts=attempts(manifest, cell)))
    return manifest


def find(name: str) -> Path:
    """The folder that a sweep's name or path stands for."""
    for folder in (ROOT / name, Path(name)):
        if (folder / FILE).is_file():
            return folder
    known = ", ".join(folder.name for folder in sweeps()) or "none"
    raise ValueError(f"sweep: no {FILE} in {ROOT / name} or {name}; sweeps under {ROOT}/: {known}")


def sweeps() -> list[Path]:
    """The folders of the sweeps under runs/, oldest first."""
    return sorted((file.parent for file in ROOT.glob(f"*/{FILE}")), key=lambda f: (f / FILE).stat().st_mtime)


def states_now(manifest: Manifest) -> dict[str, Outcome]:
    """The state of every cell, with what SLURM says where it runs them."""
    if manifest.launcher["name"] != "slurm":
        return states(manifest)
    from attnzoo.sweep import slurm

    return states(manifest, slurm.active(manifest))


def overview(folder: Path) -> list[str]:
    """A sweep in one row: name, start, cells, done, failed, and whether a process runs it."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return [folder.name, "", "", "", "", "its manifest is damaged"]
    statuses = [outcome.status for outcome in states_now(manifest).values()]
    counts = [str(n) for n in (len(statuses), statuses.count(DONE), statuses.count(FAILED))]
    running = "running" if locked(folder / LOCK) or RUNNING in statuses else ""
    return [folder.name, manifest.created[:16], *counts, running]


def _run(manifest: Manifest, wait: bool) -> tuple[Manifest, int]:
    for name in ("cells", "logs"):
        (manifest.folder / name).mkdir(exist_ok=True)
    with in_charge(manifest):
        if manifest.launcher["name"] == "slurm":
            from attnzoo.sweep import slurm

            manifest, interrupted = slurm.run(manifest, wait, extend)
            if not wait:
                return manifest, 0
        else:
            manifest, interrupted = _run_here(manifest)
    print_table(manifest, states_now(manifest))
    if interrupted:
        print(f"go on with: attnzoo sweep resume {manifest.name}")
        return manifest, INTERRUPTED
    return manifest, exit_code(manifest)


def _run_here(manifest: Manifest) -> tuple[Manifest, bool]:
    """Run on this machine; returns the sweep and whether it was interrupted."""
    manifest = extend(manifest)
    cells = pending(manifest)
    gpus = len(gpus_here(cell.config for cell in cells))
    with Display(len(cells)) as display:

        def more(known: Manifest) -> Manifest:
            new = extend(known)
            display.grow(len(new.cells) - len(known.cells))
            return new

        pool = Pool(
            manifest,
            _slots(manifest, cells),
            ranks=lambda cell: ranks_of(cell.config, gpus),
            more=more,
            show=lambda cell, outcome: display.show(manifest, cell, outcome),
        )
        interrupted = pool.run(cells)
    return pool.manifest, interrupted


def exit_code(manifest: Manifest) -> int:
    """0 if every run is done and every search found a rate, else 1; a rate that failed only lost."""
    found = {(t.arm, t.setting) for t in tuned(manifest)}
    complete = all(
        outcome.status == DONE if cell.stage == RUN else cell.group in found
        for cell, outcome in zip(manifest.cells, states(manifest).values(), strict=True)
    )
    return 0 if complete else RUN_ERROR


def extend(manifest: Manifest) -> Manifest:
    """The manifest with the runs whose learning rate has been found by now, written."""
    new = with_chosen(manifest)
    if new is not manifest:
        write_manifest(new)
    return new


def pending(manifest: Manifest) -> list[Cell]:
    """The cells that are neither done nor failed."""
    found = states(manifest)
    return [cell for cell in manifest.cells if found[cell.id].status not in (DONE, FAILED)]


def _slots(manifest: Manifest, cells: list[Cell]) -> list[Slot]:
    gpus = gpus_here(cell.config for cell in cells)
    ranks = max((ranks_of(cell.config, len(gpus)) for cell in cells), default=1)
    # a search is followed by other cells, of which there may be more
    count = max(len(cells), len(manifest.tune["runs"])) if manifest.tune else len(cells)
    return share(count, manifest.launcher["jobs"], ranks, cores_here(), gpus)
