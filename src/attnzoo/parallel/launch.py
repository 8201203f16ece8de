"""Ranks that this process starts itself: none outlives it, and one that cannot start ends the run at once."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

GRACE = 5.0  # seconds that the other ranks get to end by themselves
PARENT = "ATTNZOO_PARENT"  # of a rank, in its environment
PR_SET_PDEATHSIG = 1


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, but for what follows the death of a rank.

    Lightning's own kills this process, without a word. Here a rank that dies ends the communication, which
    says so; only while the ranks have not connected, somebody has to look at them.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self._call_children_scripts()
            del os.environ[PARENT]
            threading.Thread(target=self._watch, daemon=True, name="ranks").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        while not dist.is_initialized():
            time.sleep(0.5)
            for i, process in enumerate(self.procs):
                if process.poll() and not dist.is_initialized():
                    rank = f"rank {i + 1} of {self.num_processes} (process {process.pid})"
                    print(
                        f"error: {rank} ended with code {process.returncode} before training; "
                        "its own message is above, or see whether the memory suffices",
                        file=sys.stderr,
                        flush=True,
                    )
                    self.end(0.0)
                    os._exit(1)  # the main thread waits for the rank where nothing can interrupt it

    def end(self, grace: float = GRACE) -> None:
        """Wait for the ranks started here; those that stay are killed."""
        until = time.monotonic() + grace
        for process in self.procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.01))
        for process in self.procs:
            if process.poll() is None:
                process.kill()
                process.wait()


def adopt(trainer: pl.Trainer) -> None:
    """Let ``trainer`` start its ranks by a `Launcher`; a rank that was started so ends with its parent."""
    strategy = trainer.strategy
    known = strategy.launcher
    if not isinstance(known, _SubprocessScriptLauncher):
        return
    strategy._launcher = Launcher(known.cluster_environment, known.num_processes, known.num_nodes)
    if isinstance(known.cluster_environment, LightningEnvironment) and trainer.local_rank:
        _end_with_parent()


def end_ranks(trainer: pl.Trainer) -> None:
    """After a run: see that the ranks which it started have ended."""
    if isinstance(trainer.strategy.launcher, Launcher):
        trainer.strategy.launcher.end()


def _end_with_parent() -> None:
    """On Linux, which can ask for it; elsewhere a rank notices when it next waits for the others."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            os._exit(1)  # it has died before
