"""Ranks as threads of one process: their process group for `torch.distributed`, and what runs on each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Meeting:
    """Where the threads of one run exchange tensors."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.held: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """What every rank brought to this place."""
        self.held[rank] = value
        self.barrier.wait()
        found = list(self.held)
        self.barrier.wait()  # nobody overwrites what another still reads
        return found


class Done(dist._Work):
    def wait(self, timeout: Any = None) -> bool:
        return True


class Threads(dist.ProcessGroup):
    """One rank's view of a `Meeting`."""

    def __init__(self, rank: int, ranks: int, meeting: Meeting) -> None:
        super().__init__(rank, ranks)
        self.place, self.meeting = rank, meeting

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist._Work:
        parts = self.meeting.exchange(self.place, tensors[0].clone())
        tensors[0].copy_(torch.stack(parts).sum(0))
        return Done()

    def allgather(self, outs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None) -> dist._Work:
        for out, part in zip(outs[0], self.meeting.exchange(self.place, tensors[0].clone()), strict=True):
            out.copy_(part)
        return Done()


def on_ranks(ranks: int, run: Callable[[int, dist.ProcessGroup], Any]) -> list[Any]:
    """``run(rank, group)`` of every rank, each in a thread of its own."""
    meeting, found, errors = Meeting(ranks), [None] * ranks, []

    def one(rank: int) -> None:
        try:
            found[rank] = run(rank, Threads(rank, ranks, meeting))
        except threading.BrokenBarrierError:
            pass  # another rank failed
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert not meeting.barrier.broken, "a rank waited for others that did not come"
    return found
