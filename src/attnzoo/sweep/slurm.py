"""Cells as jobs of a SLURM cluster, through submitit: arrays, time limits, requeue.

What a job does is `CellTask`'s. Which jobs there are is asked of squeue: not every cluster keeps accounts.
"""

from __future__ import annotations

import getpass
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from attnzoo.sweep.display import Display
from attnzoo.sweep.manifest import JOBS, Cell, Manifest
from attnzoo.sweep.slurm_task import CellTask
from attnzoo.sweep.state import DONE, FAILED, QUEUED, RUNNING, states
from attnzoo.train.folder import write_json

POLL = 2.0  # seconds between two looks at the queue
KEYS = (
    *("partition", "time", "requeue", "signal_seconds", "gpus_per_node", "cpus_per_task", "mem"),
    *("account", "qos", "constraint", "array_parallelism", "setup", "additional"),
)


def check_settings(manifest: Manifest) -> None:
    """Raise a ValueError unless there is a SLURM here and its settings are known ones."""
    from attnzoo.train.settings import nearest

    for cell in manifest.cells:
        for key in cell.config["launcher"]["slurm"]:
            if key not in KEYS:
                raise ValueError(f"launcher.slurm.{key}: no such key; {nearest(key, KEYS)}")
        devices = cell.config["launcher"]["devices"]
        if not isinstance(devices, int) or devices < 1:
            raise ValueError(f"launcher.devices: must be the number of processes of a node, got {devices!r}")
    if shutil.which("sbatch") is None:
        raise ValueError("launcher: slurm needs sbatch, which is not here; start the sweep on a login node")


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
    from submitit.core.utils import FailedJobError

    running = active(manifest)
    found = states(manifest, running)
    missing = [c for c in manifest.cells if found[c.id].status not in (DONE, FAILED, RUNNING, QUEUED)]
    kinds: dict[str, list[Cell]] = {}
    for cell in missing:
        kinds.setdefault(json.dumps(cell.config["launcher"], sort_keys=True), []).append(cell)
    for cells in kinds.values():
        tasks = [CellTask(str(manifest.folder.resolve()), cell.id) for cell in cells]
        try:
            jobs = _executor(manifest, cells[0]).submit_array(tasks)
        except FailedJobError as error:
            said = str(error).strip().splitlines()[-1]
            raise ValueError(f"launcher.slurm: sbatch refused the job, {said}") from error
        ids = {cell.id: job.job_id for cell, job in zip(cells, jobs, strict=True)}
        write_json(manifest.folder / JOBS, _jobs(manifest) | ids)
    return len(missing)


def active(manifest: Manifest) -> dict[str, str]:
    """SLURM's state of the jobs that it still has, by cell id."""
    known = {job: cell for cell, job in _jobs(manifest).items()}
    if not known:
        return {}
    queue = ["squeue", "-h", "-r", "-o", "%i %T", "-u", getpass.getuser()]
    listed = subprocess.run(queue, capture_output=True, text=True, check=True).stdout
    pairs = (line.split() for line in listed.splitlines())
    return {known[job]: status for job, status in pairs if job in known and status != "COMPLETED"}


def cancel(manifest: Manifest) -> None:
    """Take the sweep's jobs from the queue; running cells stop with a checkpoint."""
    jobs = [_jobs(manifest)[cell] for cell in active(manifest)]
    if jobs:
        subprocess.run(["scancel", *jobs], check=True)
    while any(status in ("PENDING", "CONFIGURING") for status in active(manifest).values()):
        time.sleep(0.2)


def _follow(manifest: Manifest, extend: Callable[[Manifest], Manifest]) -> Manifest:
    """Wait until no cell has a job, submitting what comes up meanwhile."""
    waiting = {cell for cell, outcome in states(manifest).items() if outcome.status not in (DONE, FAILED)}
    with Display(len(waiting)) as display:
        while True:
            jobs, found = active(manifest), states(manifest)
            for cell in manifest.cells:
                # SLURM may still list the job of a cell that has ended
                over = found[cell.id].status in (DONE, FAILED)
                if cell.id in waiting and (over or cell.id not in jobs):
                    waiting.remove(cell.id)
                    display.show(manifest, cell, found[cell.id])
            new = extend(manifest)
            if len(new.cells) > len(manifest.cells):
                fresh = new.cells[len(manifest.cells) :]
                manifest = new
                waiting |= {cell.id for cell in fresh}
                display.grow(len(fresh))
                submit(manifest)
            elif not jobs:
                return manifest
            time.sleep(POLL)


def _executor(manifest: Manifest, cell: Cell) -> Any:
    from submitit import SlurmExecutor

    launcher = cell.config["launcher"]
    slurm = launcher["slurm"]
    devices, nodes = launcher["devices"], launcher["num_nodes"]
    gpus = slurm["gpus_per_node"]
    if gpus is None and launcher["accelerator"] in ("gpu", "cuda"):
        gpus = devices
    settings = {
        "job_name": manifest.name,
        "partition": slurm["partition"],
        "time": slurm["time"],
        "nodes": nodes,
        "ntasks_per_node": devices,
        "gpus_per_node": gpus,
        "cpus_per_task": slurm["cpus_per_task"],
        "mem": f"{slurm['mem']}G" if slurm["mem"] else None,
        "account": slurm["account"],
        "qos": slurm["qos"],
        "constraint": slurm["constraint"],
        "array_parallelism": slurm["array_parallelism"],
        "setup": list(slurm["setup"]),
        "signal_delay_s": slurm["signal_seconds"],
        "stderr_to_stdout": True,
        "additional_parameters": {"requeue": True, **slurm["additional"]},
        # a rank that has died would leave the others waiting for it
        "srun_args": ["--kill-on-bad-exit=1"],
    }
    executor = SlurmExecutor(manifest.folder.resolve() / "slurm", max_num_timeout=slurm["requeue"])
    executor.update_parameters(**{key: value for key, value in settings.items() if value is not None})
    return executor


def _jobs(manifest: Manifest) -> dict[str, str]:
    with suppress(OSError, ValueError):
        return json.loads((manifest.folder / JOBS).read_text())
    return {}
