"""Writing beside training: at most one work at a time, and its failure is not lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnzoo.train.guard import RunFailed


class Writer:
    """Runs a work at once, or in a thread if ``background``."""

    def __init__(self, background: bool) -> None:
        self.background = background
        self._thread: threading.Thread | None = None
        self._failure: str | None = None

    def start(self, work: Callable[[], Any]) -> None:
        """Begin a work; `finish` must have been called since the one before."""
        assert self._thread is None
        if not self.background:
            self._run(work)
            return
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def finish(self) -> str | None:
        """Wait for the work; returns why it failed, in one line, or None."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        return failure

    def _run(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except RunFailed as error:
            self._failure = str(error)
        except Exception as error:
            if not self.background:
                raise
            self._failure = f"the checkpoint was not written: {type(error).__name__}: {error}"


def to_cpu(content: Any, seen: dict[tuple, Tensor] | None = None) -> Any:
    """A copy on the CPU of nested dicts and lists; tensors that share their memory still do."""
    seen = {} if seen is None else seen
    if isinstance(content, dict):
        return {key: to_cpu(value, seen) for key, value in content.items()}
    if isinstance(content, list):
        return [to_cpu(value, seen) for value in content]
    if not isinstance(content, Tensor):
        return content
    place = place_of(content)
    if place not in seen:
        seen[place] = content.detach().to("cpu", copy=True)
    return seen[place]


def place_of(tensor: Tensor) -> tuple:
    """What two tensors have in common that are the same numbers in memory."""
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()
