"""Functions of the tests as processes of their own, which may be killed, without paying for imports again.

One server process imports the library and its trainer once, before any other thread starts, and every child
is a fork of it. (The test process itself cannot be forked: torch refuses to compute gradients in a fork of a
process that has computed some.) A child leads a process group, so that nothing it starts outlives it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = ["preload"]
TIMEOUT = 120.0  # seconds


class Ended(NamedTuple):
    """How a child ended: its exit code, negative for a signal, and what it and its own children said."""

    returncode: int
    stdout: str
    stderr: str


class Child:
    """``function(*args)`` in a fork of the server.

    Args:
        function: of a module's top level. Its return value is lost; SystemExit gives the exit code, and any
            other exception prints its stack and exits with 1.
        env: changes to the environment; it is as it was in the test process when the first child started.
        cwd: working folder.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *args: Any,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self._said = tempfile.TemporaryDirectory(prefix="child-")
        self.out, self.err = (Path(self._said.name, name) for name in ("out", "err"))
        _start_server()
        child = (str(self.out), str(self.err), dict(env or {}), str(cwd or Path.cwd()), function, args)
        self._process = multiprocessing.get_context("forkserver").Process(target=_child, args=child)
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout: float = TIMEOUT) -> Ended:
        """Its end; what it started and left is killed.

        Raises:
            TimeoutError: it took too long, and was killed; the message has what it said.
        """
        self._process.join(timeout)
        late = self.alive
        self.kill_group()
        self._process.join()
        until(lambda: not group(self.pid))
        ended = Ended(self._process.exitcode, *(_text(path) for path in (self.out, self.err)))
        if late:
            raise TimeoutError(f"no end after {timeout:g} s; it said {ended.stdout}{ended.stderr}")
        return ended

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child alone."""
        os.kill(self.pid, number)

    def kill_group(self) -> None:
        """End the child and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run_child(
    function: Callable[..., Any],
    *args: Any,
    timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Ended:
    """Run a child (see `Child`) to its end."""
    return Child(function, *args, env=env, cwd=cwd).wait(timeout)


def start_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int = 2,
    env: Sequence[Mapping[str, str]] | Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> list[Child]:
    """The same child once per rank, in an environment as torchrun makes it; ``env`` may differ by rank."""
    port = free_port()
    world = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"test-{port}",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    more = [env or {}] * ranks if isinstance(env, Mapping | None) else list(env)
    return [
        Child(function, *args, env=world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | more[rank], cwd=cwd)
        for rank in range(ranks)
    ]


def free_port() -> int:
    """A port for rank 0 to listen on; none that the system may deal out to another connection meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def group(leader: int) -> list[int]:
    """The processes of a child's group that still run, zombies left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # pid (command) state parent group ...: the command may hold blanks and brackets
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


def until(condition: Callable[[], Any], timeout: float = TIMEOUT) -> None:
    """Come back as soon as ``condition`` holds."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)


def _start_server() -> None:
    """Start the server unless it runs, with what must be set before numpy and torch are imported."""
    forkserver.set_forkserver_preload(PRELOAD)
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child(
    out: str, err: str, env: dict[str, str], cwd: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.setsid()
    # whoever started the tests may have had them ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # data workers start as they do in a run of a user
    for path, number in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.update(env)
    if "RANK" in env:  # Lightning reads it when it is imported, which the server has done
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = int(env["RANK"])
    os.chdir(cwd)
    function(*args)


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
