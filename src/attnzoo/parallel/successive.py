"""The channel of one process: the parts of a sequence run one after the other, in the order of the ranks.

A rank needs what the ranks to its left gave, and they have run; nothing is detached, so one backward of the
sum of all parts' losses has the gradients of all.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Successive:
    """What the parts gave so far: for each exchange, in order, what it was and the values by rank."""

    def __init__(self) -> None:
        self._given: list[tuple[str, list[Tensor]]] = []

    def channel(self) -> Part:
        """The next rank's."""
        return Part(self._given)


class Part:
    """One rank's end of `Successive`; see `attnzoo.parallel.exchange.Exchange` for the calls."""

    def __init__(self, given: list[tuple[str, list[Tensor]]]) -> None:
        self._given, self._next = given, 0

    def open(self) -> Part:
        return self

    def _values(self, what: str) -> list[Tensor]:
        """What the ranks to the left gave in the next exchange; one's own is to be added."""
        if self._next == len(self._given):
            self._given.append((what, []))
        known, values = self._given[self._next]
        assert known == what, f"the rank to the left made {known} as exchange {self._next}, this one {what}"
        self._next += 1
        return values

    def gather(self, z: Tensor, dim: int) -> Tensor:
        return self._side_by_side("gather", z, dim)

    def extend(self, z: Tensor, n: int, dim: int) -> Tensor:
        if n == 0:
            return z
        both = self._side_by_side(f"extend {n}", z, dim)
        start = max(0, both.shape[dim] - z.shape[dim] - n)
        return both.narrow(dim, start, both.shape[dim] - start)

    def _side_by_side(self, what: str, z: Tensor, dim: int) -> Tensor:
        values = self._values(what)
        values.append(z)
        return torch.cat(values, dim=dim)

    def receive(self, like: Tensor) -> Tensor:
        self._open = self._values(f"state {tuple(like.shape)}")
        return self._open[-1] if self._open else torch.zeros_like(like)

    def send(self, value: Tensor) -> None:
        self._open.append(value)

    def total(self, z: Tensor) -> Tensor:
        raise ValueError("collector: a sum over all parts needs them at once; run the ranks as processes")

    def tie(self, y: Tensor) -> Tensor:
        return y
