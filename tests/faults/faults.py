"""Faults, and how they are injected into children of the tests.

    kill -9           test_fault_kills    in a named phase, drawn by seed; `scripts/faults.py` for many
    disk full         test_fault_disk     a tmpfs of a few kilobytes, else a limit on the size of files
    read-only folder  test_fault_disk     a read-only tmpfs, else permissions of an unprivileged user
    damaged files     test_fault_damage   truncated and flipped checkpoints, shards and token caches
    worker processes  test_fault_workers  one dies, one hangs
    numbers           test_fault_numbers  NaN in a layer, a bit flip in the weights between steps
    ranks             test_fault_ranks    one dies, one hangs, one fails by itself, the first one dies
    clock             test_fault_clock    the wall clock jumps by hours, back and forth

After each: what the last checkpoint held is there, nothing that is damaged is used, and one line
says what happened and the way out.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000
READ_ONLY, REMOUNT, PRIVATE = 1, 32, 1 << 18 | 1 << 14


def cli(*arguments: str) -> None:
    """`attnzoo`, as a child."""
    from attnzoo.cli import main

    sys.exit(main(list(arguments)))


def strike(fault: str, error: Exception) -> None:
    """What befalls the process that calls it: it "dies", "hangs", or raises ``error``."""
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(1000)
    raise error


def train_command(folder: Path, *more: str, name: str = "run") -> list[str]:
    """The arguments of `attnzoo train` for a tiny run in ``folder / name``."""
    from runs import overrides

    given = {argument.partition("=")[0] for argument in more}
    kept = [argument for argument in overrides(folder) if argument.partition("=")[0] not in given]
    return ["train", *kept, f"hydra.run.dir={folder / name}", *more]


def small_disk(path: Path, size: int) -> str:
    """Give this process a disk of ``size`` bytes at ``path``; returns what it is.

    Where no file system may be mounted the kernel refuses files over ``size`` instead, with another error
    number that is treated alike.
    """
    path.mkdir(parents=True, exist_ok=True)
    if _own_mounts() and _mount(path, 0, f"size={size}"):
        return "tmpfs"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return "limit"


def read_only(path: Path) -> str:
    """Let this process read but not write ``path``; returns how."""
    path.mkdir(parents=True, exist_ok=True)
    if _own_mounts() and _mount(path, READ_ONLY, ""):
        return "tmpfs"
    path.chmod(0o555)
    if os.getuid() == 0:  # whom permissions do not bind
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return "permissions"


def _own_mounts() -> bool:
    """Leave the mounts of the other processes; the forked child has one thread, as the kernel wants it."""
    library = ctypes.CDLL(None, use_errno=True)
    ids = os.getuid(), os.getgid()
    if library.unshare(NEW_MOUNTS) != 0:
        if library.unshare(NEW_MOUNTS | NEW_USER) != 0:
            return False
        Path("/proc/self/setgroups").write_text("deny")
        for name, number in zip(("uid", "gid"), ids, strict=True):
            Path(f"/proc/self/{name}_map").write_text(f"{number} {number} 1")
    return library.mount(None, b"/", None, PRIVATE, None) == 0


def _mount(path: Path, flags: int, options: str) -> bool:
    library = ctypes.CDLL(None, use_errno=True)
    return library.mount(b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode()) == 0


def before(owner: Any, name: str, action: Callable[..., Any]) -> None:
    """Call ``action`` with the arguments of each call of ``owner.name``, before it."""
    known = getattr(owner, name)

    def call(*args: Any, **more: Any) -> Any:
        action(*args, **more)
        return known(*args, **more)

    setattr(owner, name, call)


def one_line(said: str) -> str:
    """The only error line of what a child said."""
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    return line
