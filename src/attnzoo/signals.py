"""The signals that ask a run to stop: Ctrl-C, SIGTERM, SIGUSR1, which announces a preemption, and SIGHUP, by
which a terminal says that it has gone.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], None] | signal.Handlers

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOPS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
# launchers pass a Ctrl-C on that the terminal has sent to every process already
ECHO = 1.0  # seconds within which a second one is the first


def listen(handler: Handler) -> dict[int, Any]:
    """Handle the stop signals by ``handler``; returns the handlers before, for `signal.signal`.

    What whoever started this process had it ignore stays ignored. For the main thread, which alone may.
    """
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def ignore() -> None:
    """Ignore the stop signals from now on: for helpers of a run, which ends them itself.

    Schedulers send a signal to every process of a job.
    """
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):  # what came while they were `held` is forgotten with this
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextmanager
def held() -> Iterator[None]:
    """Let the stop signals wait while helpers of a run start, which `ignore` them only once they run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def on_stop(handler: Handler) -> Iterator[None]:
    """Handle the stop signals by ``handler`` for a while, then as before."""
    previous = listen(handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def deaf() -> Iterator[None]:
    """Ignore the stop signals for the moments in which a run that has ended writes what came out of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with on_stop(signal.SIG_IGN):
        yield


class Request:
    """The first stop signal becomes ``tell(number)``; a second Ctrl-C does what Ctrl-C did before.

    Schedulers send SIGTERM and SIGUSR1 more than once, to a process and to its parent, while its last step
    is still running; they end with SIGKILL.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell, self.told = tell, None
        self._terminal = [stream for stream in (1, 2) if os.isatty(stream)]
        self._previous = listen(self._hear) if threading.current_thread() is threading.main_thread() else {}

    def _hear(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if signal.Signals(number).name == "SIGHUP":
            self._leave_terminal()
        if self.told is None:
            self.told = now
            self.tell(number)
        elif number == signal.SIGINT and now - self.told > ECHO:
            self.close()
            signal.raise_signal(number)

    def _leave_terminal(self) -> None:
        """What is said from now on goes nowhere, where it would be an error: the run has to end well."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in self._terminal:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def close(self) -> None:
        """Handle the signals as before."""
        for number, before in self._previous.items():
            signal.signal(number, before)


def exit_code(number: int) -> int:
    """The code with which a process ends that a signal has stopped, as shells and schedulers count."""
    return 128 + number
