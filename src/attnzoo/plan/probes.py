"""Stand-ins that count what a rank would exchange: nothing is sent, and what would arrive has the right
shape.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx

from attnzoo.parallel.tensor import Share


class Exchanges(NamedTuple):
    """Bytes of a part of a model, in one direction of a micro-batch, and the number of calls.

    Args:
        added: summed over the ranks that share heads. gathered: rows of all ranks that share sequences, also
        of
            sums that each gets a part of. passed: to the next of these.
    """

    added: float = 0
    gathered: float = 0
    passed: float = 0
    added_calls: float = 0
    gathered_calls: float = 0
    passed_calls: float = 0


class Tally:
    """Counts by kind; ``now`` is whose turn it is, such as the backward pass of a layer."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()

    def add(self, kind: str, z: Tensor, times: int = 1) -> None:
        self.now[kind] += times * z.numel() * z.element_size()
        self.now[f"{kind}_calls"] += 1

    def take(self) -> Exchanges:
        """What was counted since the last time."""
        found, self.now = self.now, Counter()
        return Exchanges(**found)


class QuietRanks:
    """In place of `attnzoo.parallel.exchange.Group`, for its `Exchange`: the last of ``ranks``."""

    def __init__(self, ranks: int, tally: Tally) -> None:
        self.rank, self.ranks, self.tally = ranks - 1, ranks, tally

    def open(self) -> object:
        from attnzoo.parallel.exchange import Exchange

        return Exchange(self)

    def post(self, z: Tensor, to: int) -> None:
        self.tally.add("passed", z)

    def take(self, like: Tensor, source: int) -> Tensor:
        self.tally.add("passed", like)
        return torch.empty_like(like)

    def collect(self, z: Tensor) -> Tensor:
        self.tally.add("gathered", z, self.ranks)
        return z.new_empty(self.ranks, *z.shape)

    def scatter_sum(self, z: Tensor) -> Tensor:
        self.tally.add("gathered", z)
        return torch.empty_like(z[0])

    def add(self, z: Tensor) -> Tensor:
        self.tally.add("gathered", z, 2)
        return z.clone()


@dataclass(frozen=True)
class QuietShare(Share):
    """Rank 0's share of the heads."""

    tally: Tally = field(default_factory=Tally, compare=False)

    def enter(self, x: Tensor) -> Tensor:
        return _Enter.apply(x, self.tally)

    def leave(self, y: Tensor) -> Tensor:
        return _Leave.apply(y, self.tally)

    def total(self, z: Tensor) -> Tensor:
        return self.enter(self.leave(z))


class _Enter(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tally: Tally) -> Tensor:
        ctx.tally = tally
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.tally.add("added", grad)
        return grad.clone(), None


class _Leave(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, tally: Tally) -> Tensor:
        tally.add("added", y)
        return y.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
