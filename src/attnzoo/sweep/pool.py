"""Cells side by side on this machine, each a process of its own with its share of the cores and GPUs.

A cell's standard input is a pipe whose other end only the sweep holds. Closing it asks the cell to stop with
a checkpoint, and so does the death of the sweep, even by SIGKILL: no cell outlives its sweep for long.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from attnzoo.cli import INTERRUPTED
from attnzoo.signals import on_stop
from attnzoo.sweep.manifest import Cell, Manifest
from attnzoo.sweep.slots import Slot
from attnzoo.sweep.state import DONE, FAILED, STOPPED, Outcome, attempts, read_outcome, write_outcome

# 1 is torchrun's, whose ranks were stopped
STOPS = (-signal.SIGTERM, -signal.SIGKILL, INTERRUPTED, 1)
POLL = 0.1  # seconds between two looks at the cells
MODULE = "attnzoo.sweep.cell"


@dataclass
class Job:
    """A running cell."""

    cell: Cell
    slot: Slot
    process: subprocess.Popen
    attempts: int
    begun: float = field(default_factory=time.monotonic)

    def stop(self) -> None:
        """Ask for a checkpoint and an end."""
        with suppress(OSError):
            self.process.stdin.close()


class Pool:
    """Runs cells until none is left or a stop is asked for.

    Args:
        slots: one cell runs in each at a time.
        ranks: processes of a cell.
        more: called whenever a cell has ended; gives the sweep with the cells that have come up since.
        show: called with a job and its outcome (None when it starts).
    """

    def __init__(
        self,
        manifest: Manifest,
        slots: list[Slot],
        ranks: Callable[[Cell], int],
        more: Callable[[Manifest], Manifest] = lambda manifest: manifest,
        show: Callable[[Cell, Outcome | None], None] = lambda cell, outcome: None,
    ) -> None:
        self.manifest, self.free, self.ranks, self.more, self.show = manifest, list(slots), ranks, more, show
        self.jobs: list[Job] = []
        self.requests = 0  # to stop

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        return self.requests > 0

    def run(self, cells: list[Cell]) -> bool:
        """Train ``cells`` and those that come up; returns whether it was interrupted."""
        waiting = list(cells)
        with on_stop(self._request):
            while self.jobs or (waiting and not self.stopping):
                while waiting and self.free and not self.stopping:
                    self._start(waiting.pop(0))
                time.sleep(POLL)
                self._pass_on()
                for job in [job for job in self.jobs if job.process.poll() is not None]:
                    self._end(job)
                    known = {cell.id for cell in self.manifest.cells}
                    self.manifest = self.more(self.manifest)
                    waiting += [cell for cell in self.manifest.cells if cell.id not in known]
        return self.stopping

    def _start(self, cell: Cell) -> None:
        slot, ranks = self.free.pop(0), self.ranks(cell)
        with open_log(self.manifest, cell) as log:
            process = subprocess.Popen(
                command(self.manifest, cell, ranks),
                env=_environment(slot, ranks),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C on the terminal reaches the sweep alone
            )
        if hasattr(os, "sched_setaffinity"):
            with suppress(OSError):
                os.sched_setaffinity(process.pid, slot.cores)
        self.jobs.append(Job(cell, slot, process, attempts(self.manifest, cell)))
        self.show(cell, None)

    def _end(self, job: Job) -> None:
        self.jobs.remove(job)
        self.free.insert(0, job.slot)
        job.stop()
        seconds = round(time.monotonic() - job.begun, 2)
        self.show(
            job.cell,
            settle(
                self.manifest,
                job.cell,
                job.process.returncode,
                job.attempts,
                seconds,
                stops=STOPS if self.stopping else (),
            ),
        )

    def _request(self, *signal: Any) -> None:
        self.requests += 1

    def _pass_on(self) -> None:
        """The first request stops the cells gracefully, a second one at once."""
        for job in self.jobs if self.requests else ():
            job.stop()
            if self.requests > 1:
                with suppress(OSError):
                    os.killpg(job.process.pid, signal.SIGKILL)


def command(manifest: Manifest, cell: Cell, ranks: int) -> list[str]:
    """The command of a cell that watches its standard input; several ranks start by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    start = [*torchrun, "-m", MODULE] if ranks > 1 else ["-m", MODULE]
    return [sys.executable, *start, str(manifest.folder.resolve()), cell.id, "--watch"]


def settle(
    manifest: Manifest, cell: Cell, code: int, before: int, seconds: float, stops: Sequence[int] = ()
) -> Outcome:
    """The outcome of an attempt whose process has ended; written here where the process could not.

    Args:
        code: exit code, negative for a signal.
        before: attempts that had ended when this one started.
        stops: exit codes that stand for a stop that was asked for.
    """
    outcome = read_outcome(manifest, cell)
    if outcome and outcome.attempts > before:
        return outcome
    if code == 0:
        outcome = Outcome(DONE, 0, "", before + 1, seconds)
    elif code in stops:
        outcome = Outcome(STOPPED, code, "before its first step", before + 1, seconds)
    else:
        outcome = Outcome(FAILED, code, why(code, manifest.log_file(cell)), before + 1, seconds)
    write_outcome(manifest, cell, outcome)
    return outcome


def why(code: int, log: Path) -> str:
    """Why a process failed that could not say it itself: the signal, or the end of its log."""
    if code < 0:
        name = signal.Signals(-code).name
        memory = ", perhaps for memory" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}; see {log}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-200:] if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else lines[-1] if lines else f"exit code {code}"


@contextmanager
def open_log(manifest: Manifest, cell: Cell) -> Iterator[IO[bytes]]:
    """The cell's log, to go on with."""
    file = manifest.log_file(cell)
    file.parent.mkdir(exist_ok=True)
    with file.open("ab") as log:
        yield log


def _environment(slot: Slot, ranks: int) -> dict[str, str]:
    # inside someone's SLURM job, Lightning would take the job's tasks for its ranks
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    threads = max(len(slot.cores) // ranks, 1)
    if (asked := kept.get("OMP_NUM_THREADS", "")).isdecimal():
        threads = min(threads, max(int(asked), 1))
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **({"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if slot.gpus else {}),
    }
