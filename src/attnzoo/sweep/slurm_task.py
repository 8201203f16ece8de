"""What a job of a SLURM cluster does for a sweep.

Each task of a job starts one cell process with an environment as torchrun makes it, so several GPUs and
nodes need nothing else. Before the time limit, and when a job is preempted, submitit calls
`CellTask.checkpoint`: the cell stops with a checkpoint, the job is requeued, and the cell goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from attnzoo.cli import INTERRUPTED
from attnzoo.sweep.manifest import read_manifest
from attnzoo.sweep.pool import MODULE, open_log, settle
from attnzoo.sweep.state import DONE, FAILED, attempts

PATIENCE = 60.0  # seconds that a task whose cell was stopped by SLURM waits for what SLURM does next


class CellTask:
    """What one task of a job runs. submitit pickles it, so it holds names only."""

    def __init__(self, folder: str, cell: str) -> None:
        self.folder, self.cell = folder, cell
        self.child: int | None = None

    def __call__(self) -> str:
        """Train the cell in a process of its own; returns how it ended, or raises for a failure."""
        manifest = read_manifest(self.folder)
        cell = manifest.cell(self.cell)
        before, begun = attempts(manifest, cell), time.monotonic()
        with open_log(manifest, cell) as log:
            process = subprocess.Popen(
                [sys.executable, "-m", MODULE, self.folder, self.cell],
                env=os.environ | _rank_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_requeue_signal,
            )
        self.child = process.pid
        code = process.wait()
        if int(os.environ["SLURM_PROCID"]):
            if code not in (0, INTERRUPTED, -signal.SIGTERM):
                raise RuntimeError(f"{self.cell}: rank {os.environ['SLURM_PROCID']} ended with {code}")
            return "see rank 0"
        seconds = round(time.monotonic() - begun, 2)
        outcome = settle(manifest, cell, code, before, seconds, stops=(-signal.SIGTERM,))
        if outcome.status == FAILED:
            raise RuntimeError(f"{self.cell}: {outcome.reason}")
        if outcome.status != DONE:
            _await_slurm()
        return outcome.status

    def checkpoint(self) -> Any:
        """Called in submitit's signal handler, while `__call__` waits: stop the cell, and be requeued."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.child, signal.SIGTERM)
                # leaves the child to the wait that this handler interrupted
                os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(CellTask(self.folder, self.cell))


def _rank_environment() -> dict[str, str]:
    """As torchrun makes it. The run id keeps Lightning from reading SLURM's variables itself."""
    from submitit.helpers import TorchDistributedEnvironment

    ranks = TorchDistributedEnvironment()
    run = [os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")]
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    return {
        "MASTER_ADDR": ranks.master_addr,
        "MASTER_PORT": str(ranks.master_port),
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world_size),
        "GROUP_RANK": os.environ.get("SLURM_NODEID", "0"),
        "TORCHELASTIC_RUN_ID": "-".join(run),
        "OMP_NUM_THREADS": str(cores),
        "PYTHONUNBUFFERED": "1",
    }


def _ignore_requeue_signal() -> None:
    # SLURM sends it to all processes of a task; it is for submitit, and would end the cell
    from submitit.core.job_environment import JobEnvironment

    signal.signal(JobEnvironment._usr_sig(), signal.SIG_IGN)


def _await_slurm() -> None:
    """SLURM has stopped the cell. If it preempts the job, leaving now would end it as completed."""
    job = os.environ["SLURM_JOB_ID"]
    queue = ["squeue", "-h", "-j", job, "-o", "%T"]
    listed = subprocess.run(queue, capture_output=True, text=True, check=False)
    if listed.stdout.strip() == "RUNNING":
        time.sleep(PATIENCE)
