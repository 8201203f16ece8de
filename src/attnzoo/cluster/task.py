"""What one task of a job does: it starts a rank as a process of its own, and passes signals on.

Before the time limit, and when a job is preempted, SLURM sends a signal. The run then stops with a
checkpoint, the task leaves with `AGAIN`, the job is requeued, and the run goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from attnzoo.cluster.jobs import AGAIN
from attnzoo.cluster.ranks import from_slurm
from attnzoo.signals import STOPS, exit_code

# codes of a run that was stopped: by its own hand, and before it could have one
STOPPED = frozenset(code for number in STOPS for code in (exit_code(number), -number))
LIMIT = signal.SIGUSR2  # submitit's, because NCCL may catch SIGUSR1
PASSED = {LIMIT: signal.SIGUSR1, signal.SIGUSR1: signal.SIGUSR1, signal.SIGTERM: signal.SIGTERM}


class Task:
    """One task of a job. submitit pickles it, so it holds names only."""

    _child: subprocess.Popen | None = None
    _heard: int | None = None

    def command(self) -> list[str]:
        """What starts the rank, Python's own path excluded."""
        raise NotImplementedError

    def log(self) -> AbstractContextManager[Any]:
        """Where the rank writes; None for the job's own log."""
        return nullcontext()

    def ended(self, code: int) -> None:
        """What rank 0's task does with a run's code, negative for a signal: nothing, or leave with one."""
        if code:
            sys.exit(AGAIN if code in STOPPED else as_shell(code))

    def __call__(self) -> str:
        """Run the rank to its end; returns, or leaves with the job's exit code."""
        for number in PASSED:
            signal.signal(number, self._pass_on)
        code = self._run()
        rank = int(os.environ["SLURM_PROCID"])
        if rank == 0:
            self.ended(code)
        elif code and code not in STOPPED:
            sys.exit(as_shell(code))
        return f"rank {rank} ended with {code}"

    def _run(self) -> int:
        cores = os.environ.get("SLURM_CPUS_PER_TASK", "1")
        environment = os.environ | from_slurm() | {"OMP_NUM_THREADS": cores, "PYTHONUNBUFFERED": "1"}
        with self.log() as log:
            self._child = subprocess.Popen(
                [sys.executable, *self.command()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=None if log is None else subprocess.STDOUT,
                preexec_fn=_ignore_limit,
            )
        if self._heard:  # in the moment before there was a child
            self._pass_on(self._heard)
        return self._child.wait()

    def _pass_on(self, number: int, *frame: Any) -> None:
        self._heard = number
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(PASSED[number])


def as_shell(code: int) -> int:
    """A process's code as shells count: a signal is 128 and its number."""
    return code if code >= 0 else exit_code(-code)


def _ignore_limit() -> None:
    # SLURM sends it to all processes of a task, and it would end the rank, which gets another instead
    signal.signal(LIMIT, signal.SIG_IGN)
