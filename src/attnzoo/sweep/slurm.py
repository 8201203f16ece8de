"""Cells as jobs of a SLURM cluster: arrays, and who has a job already.

What a job does is `CellTask`'s, and how it is asked for is `attnzoo.cluster.jobs`'.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress

from attnzoo.cluster import jobs
from attnzoo.cluster.jobs import check_launcher
from attnzoo.sweep.display import Display
from attnzoo.sweep.manifest import JOBS, Cell, Manifest
from attnzoo.sweep.slurm_task import CellTask
from attnzoo.sweep.state import DONE, FAILED, QUEUED, RUNNING, states
from attnzoo.train.folder import write_json

POLL = 2.0  # seconds between two looks at the queue


def check_settings(manifest: Manifest) -> None:
    """Raise a ValueError unless there is a SLURM here and its settings are known ones."""
    for cell in manifest.cells:
        check_launcher(cell.config["launcher"])


def run(manifest: Manifest, wait: bool, extend: Callable[[Manifest], Manifest]) -> tuple[Manifest, bool]:
    """Submit every cell that is neither done nor failed and has no job; with ``wait``, see them end.

    Args:
        extend: gives the sweep with the cells that have come up since.

    Returns:
        The sweep, and whether the wait was interrupted; the jobs then go on.
    """
    manifest = extend(manifest)
    submitted = submit(manifest)
    print(f"submitted {submitted} cells; follow them with: attnzoo sweep status {manifest.name}", flush=True)
    if not wait:
        if manifest.searching:
            print(f"when they have ended, attnzoo sweep resume {manifest.name} submits the runs proper")
        return manifest, False
    try:
        return _follow(manifest, extend), False
    except KeyboardInterrupt:
        print("the jobs go on without this process")
        return manifest, True


def submit(manifest: Manifest) -> int:
    """Submit what is missing, one array for each kind of job; returns the number of cells."""
    running = active(manifest)
    found = states(manifest, running)
    missing = [c for c in manifest.cells if found[c.id].status not in (DONE, FAILED, RUNNING, QUEUED)]
    kinds: dict[str, list[Cell]] = {}
    for cell in missing:
        kinds.setdefault(json.dumps(cell.config["launcher"], sort_keys=True), []).append(cell)
    for cells in kinds.values():
        tasks = [CellTask(str(manifest.folder.resolve()), cell.id) for cell in cells]
        folder, launcher = manifest.folder.resolve() / "slurm", cells[0].config["launcher"]
        submitted = jobs.submit(folder, manifest.name, launcher, tasks)
        ids = {cell.id: job for cell, job in zip(cells, submitted, strict=True)}
        write_json(manifest.folder / JOBS, _jobs(manifest) | ids)
    return len(missing)


def active(manifest: Manifest) -> dict[str, str]:
    """SLURM's state of the jobs that it still has, by cell id."""
    known = {job: cell for cell, job in _jobs(manifest).items()}
    return {known[job]: status for job, status in jobs.queued(known).items()}


def cancel(manifest: Manifest) -> None:
    """Take the sweep's jobs from the queue; running cells stop with a checkpoint."""
    jobs.cancel([_jobs(manifest)[cell] for cell in active(manifest)])
    while any(status in ("PENDING", "CONFIGURING") for status in active(manifest).values()):
        time.sleep(0.2)


def _follow(manifest: Manifest, extend: Callable[[Manifest], Manifest]) -> Manifest:
    """Wait until no cell has a job, submitting what comes up meanwhile."""
    waiting = {cell for cell, outcome in states(manifest).items() if outcome.status not in (DONE, FAILED)}
    with Display(len(waiting)) as display:
        while True:
            running, found = active(manifest), states(manifest)
            for cell in manifest.cells:
                # SLURM may still list the job of a cell that has ended
                over = found[cell.id].status in (DONE, FAILED)
                if cell.id in waiting and (over or cell.id not in running):
                    waiting.remove(cell.id)
                    display.show(manifest, cell, found[cell.id])
            new = extend(manifest)
            if len(new.cells) > len(manifest.cells):
                fresh = new.cells[len(manifest.cells) :]
                manifest = new
                waiting |= {cell.id for cell in fresh}
                display.grow(len(fresh))
                submit(manifest)
            elif not running:
                return manifest
            time.sleep(POLL)


def _jobs(manifest: Manifest) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return json.loads((manifest.folder / JOBS).read_text())
    return {}
