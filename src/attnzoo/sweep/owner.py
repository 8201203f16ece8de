"""Who runs a sweep: one process at a time, known by a lock that the system frees when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from attnzoo.sweep.manifest import Manifest
from attnzoo.sweep.state import locked
from attnzoo.train.folder import write_json

LOCK, OWNER = "sweep.lock", "sweep.json"
GLANCE = 1.0  # seconds, more than any look at a lock takes


@contextmanager
def in_charge(manifest: Manifest) -> Iterator[None]:
    """Be the only process that starts cells of this sweep."""
    try:
        lock = FileLock(manifest.folder / LOCK, timeout=GLANCE).acquire()
    except Timeout:
        raise ValueError(
            f"sweep: {manifest.name} is running (process {owner(manifest).get('pid', 'unknown')}); "
            f"watch it with attnzoo sweep status {manifest.name}, or cancel it"
        ) from None
    with lock:
        write_json(manifest.folder / OWNER, {"pid": os.getpid(), "host": socket.gethostname()})
        try:
            yield
        finally:
            (manifest.folder / OWNER).unlink(missing_ok=True)


def owner(manifest: Manifest) -> dict[str, Any]:
    """Process id and host of the process that runs the sweep, empty if none does."""
    with suppress(OSError, ValueError):
        return json.loads((manifest.folder / OWNER).read_text())
    return {}


def stop_owner(manifest: Manifest) -> None:
    """End the process that runs the sweep, if one does: the lock says so, the file beside it which."""
    told = None
    while locked(manifest.folder / LOCK):
        running = owner(manifest)
        if running.get("host", socket.gethostname()) != socket.gethostname():
            raise ValueError(f"sweep: {manifest.name} runs on {running['host']}; cancel it there")
        if running and running["pid"] != told:
            told = running["pid"]
            with suppress(ProcessLookupError):
                os.kill(told, signal.SIGTERM)
        time.sleep(0.2)
