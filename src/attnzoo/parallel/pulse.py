"""Which rank keeps the others waiting: each tells its step, and why it goes, in the store they share."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

GRACE = 5.0  # seconds in which the ranks that lost another one tell each other so
ENDED = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|closed by (the )?(remote )?peer", re.I
)
LOST = re.compile(rf"{ENDED.pattern}|timed out|timeout|gloo|nccl", re.I)
_runs = itertools.count()  # of this process, which keeps its store over several


class Pulse(Callback):
    """Tells the other ranks how far this one is.

    A rank that loses the connection, or waits in vain, says so in the store. Who says nothing is the one that
    all wait for.

    Args:
        rank, world: this one, and how many there are.
        timeout: seconds that they wait for each other.
    """

    def __init__(self, rank: int, world: int, timeout: float) -> None:
        self.rank, self.world, self.timeout = rank, world, timeout
        self._run, self._step = next(_runs), 0

    def on_train_batch_start(self, trainer: Trainer, module: Any, *args: Any) -> None:
        step = module.progress.step + 1
        if self.world > 1 and step != self._step:
            self._set("step", self.rank, str(step))
            self._step = step

    def leave(self, reason: str) -> None:
        """Tell the others why this rank goes, if they are still there."""
        if self.world > 1 and dist.is_initialized():
            with suppress(RuntimeError):
                self._set("left", self.rank, reason)

    def explain(self, error: BaseException) -> str | None:
        """In one line, which rank was lost and how; None where ``error`` says something else."""
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and LOST.search(str(error))
        )
        if self.world == 1 or not lost:
            return None
        if not dist.is_initialized():
            first = str(error).strip().splitlines()[0]
            return f"the {self.world} ranks did not all connect within {self.timeout:g} s ({first})"
        ended = bool(ENDED.search(str(error)))
        try:
            return self._ask(ended)
        except RuntimeError:  # its host is gone, which is the first rank unless a launcher is it
            return "rank 0, or the launcher, is gone: it died or left"

    def _ask(self, ended: bool) -> str:
        self._set("lost", self.rank, "")
        others = [rank for rank in range(self.world) if rank != self.rank]
        self._wait(lambda: all(self._told(rank) for rank in others))
        silent = [rank for rank in others if not self._told(rank)]
        left = [rank for rank in others if self._has("left", rank)]
        told = [rank for rank in others if self._has("lost", rank)]
        if left:
            text = f"rank {left[0]} of {self.world} left: {self._get('left', left[0])}"
        elif silent:
            how = "its process ended" if ended else f"no answer within {self.timeout:g} s, it hangs or died"
            text = "; ".join(f"rank {rank} of {self.world}: {how}{self._last(rank)}" for rank in silent)
        else:
            text = f"the connection between the {self.world} ranks was lost, but they all run"
        self._set("read", self.rank, "")
        # the store goes with its host, so the others read first
        self._wait(lambda: self.rank or all(self._has("read", rank) for rank in told))
        return text

    def _last(self, rank: int) -> str:
        return f" (last seen in step {self._get('step', rank)})" if self._has("step", rank) else ""

    def _told(self, rank: int) -> bool:
        return self._has("lost", rank) or self._has("left", rank)

    def _wait(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + min(GRACE, self.timeout)
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)

    def _key(self, what: str, rank: int) -> str:
        return f"attnzoo/{self._run}/{what}/{rank}"

    def _set(self, what: str, rank: int, value: str) -> None:
        _store().set(self._key(what, rank), value)

    def _has(self, what: str, rank: int) -> bool:
        return _store().check([self._key(what, rank)])

    def _get(self, what: str, rank: int) -> str:
        return _store().get(self._key(what, rank)).decode()


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()
