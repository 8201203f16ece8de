"""The channel of one process: the parts of a sequence run one after the other, in the order of the ranks.

A rank needs what the ranks to its left gave, and they have run; nothing is detached, so one backward of the
sum of all parts' losses has the gradients of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Successive:
    """What the parts gave so far: for each exchange, in order, the values by rank."""

    def __init__(self) -> None:
        self._given: list[list[object]] = []

    def channel(self) -> Part:
        """The next rank's."""
        return Part(self._given)


class Part:
    """One rank's end of `Successive`; see `attnzoo.parallel.exchange.Exchange` for the calls."""

    def __init__(self, given: list[list[object]]) -> None:
        self._given, self._next = given, 0

    def open(self) -> Part:
        return self

    def _earlier(self, value: object) -> list[object]:
        """What the ranks to the left gave in this exchange; adds one's own."""
        if self._next == len(self._given):
            self._given.append([])
        known = self._given[self._next]
        self._next += 1
        earlier = list(known)
        known.append(value)
        return earlier

    def gather(self, z: Tensor, dim: int) -> Tensor:
        return torch.cat([*self._earlier(z), z], dim=dim)

    def extend(self, z: Tensor, n: int, dim: int) -> Tensor:
        if n == 0:
            return z
        both = self.gather(z, dim)
        start = max(0, both.shape[dim] - z.shape[dim] - n)
        return both.narrow(dim, start, both.shape[dim] - start)

    def receive(self, like: Sequence[Tensor]) -> list[Tensor]:
        self._own: list[Tensor] = []  # filled by `send`
        earlier = self._earlier(self._own)
        return list(earlier[-1]) if earlier else [torch.zeros_like(z) for z in like]

    def send(self, values: Sequence[Tensor]) -> None:
        self._own.extend(values)

    def total(self, z: Tensor) -> Tensor:
        raise ValueError("collector: a sum over all parts needs them at once; run the ranks as processes")

    def tie(self, y: Tensor) -> Tensor:
        return y
