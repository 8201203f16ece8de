"""`attnzoo train launcher=slurm`: the run as a job of its own."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnzoo.cluster.jobs import check_launcher, queued, submit
from attnzoo.cluster.ranks import quoted
from attnzoo.cluster.task import Task
from attnzoo.signals import exit_code
from attnzoo.train.checkpoint import find_checkpoint
from attnzoo.train.folder import RUN_FILES, check_folder
from attnzoo.train.prepare import check_architecture
from attnzoo.train.store import FOLDER, LAST

JOBS = "slurm"  # submitit's folder inside the run folder
POLL = 2.0  # seconds between two looks at a job


class RunTask(Task):
    """One task of a run's job: the command line of `attnzoo train`, in the run's folder.

    Args:
        folder: of the run. arguments: as the user gave them.
    """

    def __init__(self, folder: str, arguments: Sequence[str]) -> None:
        self.folder, self.arguments = folder, list(arguments)

    def command(self) -> list[str]:
        more = [f"hydra.run.dir={quoted(self.folder)}"]
        if _begun(Path(self.folder)):
            more += [f"ckpt_path={quoted(self.folder)}", "init_from=null"]
        return ["-m", "attnzoo.cli", "train", *self.arguments, *more]


def submit_run(config: dict[str, Any], arguments: Sequence[str], wait: bool) -> int:
    """Submit the run and say how to follow it; with ``wait``, do so; returns the exit code.

    Args:
        config: resolved. arguments: the command line it was composed from.

    Raises:
        ValueError: a mistake in the configuration, or sbatch refuses; no job is left behind.
    """
    folder, start = Path(config["run_dir"]).resolve(), config["ckpt_path"]
    check_launcher(config["launcher"])
    check_folder(folder, find_checkpoint(start) if start else None)
    check_architecture(config)
    made = not (folder / JOBS).exists()
    try:
        name = folder.name if folder.name.isascii() else "attnzoo"
        (job,) = submit(folder / JOBS, name, config["launcher"], [RunTask(str(folder), arguments)])
    except ValueError:
        if made:
            shutil.rmtree(folder / JOBS, ignore_errors=True)
        raise
    log = folder / JOBS / f"{job}_0_log.out"
    print(f"job {job}: run folder {_short(folder)}")
    print(f"log: tail -F {_short(log)}")
    print(f"state: squeue -j {job}; stop it with a checkpoint: scancel {job}", flush=True)
    return _follow(job, folder, log) if wait else 0


def _begun(folder: Path) -> bool:
    """Whether the run has a checkpoint to go on from; what is left of one that has none is removed."""
    if (folder / FOLDER / LAST).is_file():
        return True
    for name in RUN_FILES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return False


def _follow(job: str, folder: Path, log: Path) -> int:
    """Print the job's log as it grows, until SLURM no longer has the job; returns the run's exit code."""
    shown = 0
    try:
        while True:
            waiting = queued([job])
            if log.exists():
                with log.open(errors="replace") as file:
                    file.seek(shown)
                    sys.stdout.write(file.read())
                    sys.stdout.flush()
                    shown = file.tell()
            if not waiting:
                return _code(folder)
            time.sleep(POLL)
    except KeyboardInterrupt:
        print(f"job {job} goes on without this process")
        return exit_code(2)


def _code(folder: Path) -> int:
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return 1
    return 0 if summary["status"] == "completed" else 1


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
