"""What happened to each cell, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from attnzoo.sweep.manifest import Cell, Manifest
from attnzoo.train.folder import write_json

DONE, RUNNING, QUEUED, WAITING = "done", "running", "queued", "waiting"
FAILED, STOPPED, CANCELLED = "failed", "stopped", "cancelled"
STATUSES = (DONE, RUNNING, QUEUED, WAITING, STOPPED, CANCELLED, FAILED)


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: what cells/ID.json holds.

    Args:
        code: the process's exit code, negative for a signal. reason: one line. attempts: that have ended.
        seconds: of this attempt.
    """

    status: str
    code: int = 0
    reason: str = ""
    attempts: int = 0
    seconds: float = 0.0


def read_outcome(manifest: Manifest, cell: Cell) -> Outcome | None:
    """The outcome of the last attempt, None where none has ended."""
    content = _json(manifest.outcome_file(cell))
    return Outcome(**content) if content else None


def write_outcome(manifest: Manifest, cell: Cell, outcome: Outcome) -> None:
    """Record how an attempt ended."""
    write_json(manifest.outcome_file(cell), asdict(outcome))


def attempts(manifest: Manifest, cell: Cell) -> int:
    """How many attempts have ended."""
    outcome = read_outcome(manifest, cell)
    return outcome.attempts if outcome else 0


def read_summary(manifest: Manifest, cell: Cell) -> dict[str, Any] | None:
    """The summary of the cell's run, None where there is no complete one."""
    return _json(manifest.run_folder(cell) / "summary.json")


def completed(manifest: Manifest, cell: Cell) -> bool:
    """Whether the run is complete: the summary says so, and nothing else does."""
    return (read_summary(manifest, cell) or {}).get("status") == "completed"


def state(manifest: Manifest, cell: Cell, active: Mapping[str, str] | None = None) -> Outcome:
    """What the cell is now.

    Args:
        active: SLURM's word for the jobs that it still has, by cell id.
    """
    outcome = read_outcome(manifest, cell)
    if completed(manifest, cell):
        return outcome if outcome and outcome.status == DONE else Outcome(DONE)
    if locked(manifest.lock_file(cell)):
        return Outcome(RUNNING)
    if active and cell.id in active:
        word = active[cell.id].lower()
        return Outcome(RUNNING if word == RUNNING else QUEUED, reason=f"SLURM: {word}")
    if outcome and outcome.status != DONE:
        return outcome
    if manifest.run_folder(cell).exists():
        return Outcome(STOPPED, reason="its process ended without a word; resume goes on")
    return Outcome(WAITING)


def states(manifest: Manifest, active: Mapping[str, str] | None = None) -> dict[str, Outcome]:
    """`state` of every cell, by its id."""
    return {cell.id: state(manifest, cell, active) for cell in manifest.cells}


def locked(file: Path) -> bool:
    """Whether a living process holds the lock; the system frees it whatever way the process ends."""
    try:
        import fcntl

        with open(file) as lock:  # shared: two that look do not take each other for the holder
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # a system without such locks, or a file system
        try:
            with FileLock(file, timeout=0):
                return False
        except Timeout:
            return True


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
