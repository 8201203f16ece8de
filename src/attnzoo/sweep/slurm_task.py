"""What a task of a SLURM job does for a sweep: it trains one cell, or one rank of it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager
from typing import Any

from attnzoo.cluster.jobs import AGAIN
from attnzoo.cluster.task import STOPPED, Task, as_shell
from attnzoo.sweep.manifest import read_manifest
from attnzoo.sweep.pool import MODULE, open_log, settle
from attnzoo.sweep.state import DONE, FAILED, attempts


class CellTask(Task):
    """One task of a cell's job."""

    def __init__(self, folder: str, cell: str) -> None:
        self.folder, self.cell = folder, cell

    def command(self) -> list[str]:
        manifest = read_manifest(self.folder)
        self._before, self._begun = attempts(manifest, manifest.cell(self.cell)), time.monotonic()
        return ["-m", MODULE, self.folder, self.cell]

    def log(self) -> AbstractContextManager[Any]:
        manifest = read_manifest(self.folder)
        return open_log(manifest, manifest.cell(self.cell))

    def ended(self, code: int) -> None:
        manifest = read_manifest(self.folder)
        seconds = round(time.monotonic() - self._begun, 2)
        cell = manifest.cell(self.cell)
        outcome = settle(manifest, cell, code, self._before, seconds, stops=tuple(STOPPED))
        if outcome.status == FAILED:
            print(f"{self.cell} on {os.uname().nodename}: {outcome.reason}", flush=True)
            sys.exit(as_shell(code) or 1)
        if outcome.status != DONE:
            sys.exit(AGAIN)
