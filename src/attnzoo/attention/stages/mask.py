"""Which keys a query may use: small descriptors that combine with ``&`` and ``|``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.slots import Retain
from attnzoo.attention.timeline import EVERY, Axis


class Mask:
    """A relation between the place of a query and of a key in their document; documents never mix.

    Faces: `visible` (tensors of places), `dense` (a table, for tests), `mask_mod` (FlexAttention), `span`
        (which
    keys a run of queries needs, so that kernels and chunk loops skip the rest), `retain` (what a cache must
    keep).
    """

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        """Broadcastable places -> bool."""
        raise NotImplementedError

    @property
    def causal(self) -> bool:
        """Whether it hides every later key."""
        return False

    def reach(self) -> int | None:
        """Largest distance to a key that is no sink; None = unbounded."""
        return None

    def sinks(self) -> int:
        """Keys at the start of a document that stay visible beyond `reach`."""
        return 0

    def retain(self) -> Retain | None:
        reach = self.reach()
        return None if reach is None else Retain(self.sinks(), reach + 1)

    def axes(self, query: Axis, key: Axis) -> tuple[Axis, Axis]:
        """Both axes as `rule` and the comparison of documents read them; for masks that relate documents."""
        return query, key

    def visible(self, query: Axis, key: Axis) -> Tensor:
        """``(B or 1, T, S)`` bool, True where the query may use the key."""
        query, key = self.axes(query, key)
        seen = self.rule(query.order[:, :, None], key.order[:, None, :])
        if key.doc is None:
            return seen
        doc = torch.zeros_like(query.order) if query.doc is None else query.doc
        own = key.doc[:, None, :]
        return seen & ((doc[:, :, None] == own) | (own == EVERY))

    def dense(self, length: int, keys: int | None = None) -> Tensor:
        """``(T, S)`` bool table of one document whose last query meets the last key."""
        keys = length if keys is None else keys
        q, k = torch.arange(keys - length, keys), torch.arange(keys)
        return self.rule(q[:, None], k[None, :])

    def mask_mod(self) -> Callable:
        """The rule as FlexAttention wants it."""
        return lambda b, h, q, k: self.rule(q, k)

    def pairs(self, length: int) -> int:
        """Visible pairs of one document of ``length`` tokens."""
        return _pairs(self, length)

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Either(self, other)


@lru_cache(maxsize=256)
def _pairs(mask: Mask, length: int) -> int:
    step, total = 1024, 0
    keys = torch.arange(length, device="cpu")  # also where a mixer is made without memory
    for first in range(0, length, step):
        rows = torch.arange(first, min(first + step, length), device="cpu")
        total += int(mask.rule(rows[:, None], keys[None]).sum())
    return total


@dataclass(frozen=True)
class Causal(Mask):
    """Keys at or before the query."""

    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def pairs(self, length: int) -> int:
        return length * (length + 1) // 2


@dataclass(frozen=True)
class Window(Mask):
    """Keys at distance below ``size``; the query's own token counts, so 1 means itself only."""

    size: int

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (q - k < self.size) & (k - q < self.size)

    def reach(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Sinks(Mask):
    """The first ``count`` keys of the document."""

    count: int

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.count) & (q >= 0)

    def reach(self) -> int:
        return -1

    def sinks(self) -> int:
        return self.count


@dataclass(frozen=True)
class Blocks(Mask):
    """Keys of the query's own block of ``size`` tokens, blocks being counted inside the document."""

    size: int

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return q // self.size == k // self.size

    def reach(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Both(Mask):
    """Keys that both masks show."""

    a: Mask
    b: Mask

    @property
    def causal(self) -> bool:
        return self.a.causal or self.b.causal

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.rule(q, k) & self.b.rule(q, k)

    def reach(self) -> int | None:
        reaches = [r for r in (self.a.reach(), self.b.reach()) if r is not None]
        return min(reaches) if reaches else None

    def sinks(self) -> int:
        # a bounded mask needs its sinks; an unbounded one shows them anyway
        bounded = [m.sinks() for m in (self.a, self.b) if m.reach() is not None]
        return max(bounded, default=0)


@dataclass(frozen=True)
class Either(Mask):
    """Keys that one of two masks shows."""

    a: Mask
    b: Mask

    @property
    def causal(self) -> bool:
        return self.a.causal and self.b.causal

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return self.a.rule(q, k) | self.b.rule(q, k)

    def reach(self) -> int | None:
        reaches = (self.a.reach(), self.b.reach())
        return None if None in reaches else max(reaches)

    def sinks(self) -> int:
        return max(self.a.sinks(), self.b.sinks())


class Static(Stage):
    """Mask stage: the same rule whatever the queries and keys."""

    alike = True

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, q: Tensor, keys: object, call: Call) -> Mask:
        return self.mask

    def retain(self) -> Retain | None:
        return self.mask.retain()


def band(window: int | None = None, n_sink: int = 0) -> Mask:
    """The causal mask, in a window of ``window`` keys plus the document's first ``n_sink`` where a window is
    given.

    Raises:
        ValueError: ``window`` < 1, ``n_sink`` < 0, or sinks without a window.
    """
    if window is None:
        if n_sink:
            raise ValueError(
                f"n_sink: sinks extend a window, got n_sink={n_sink} without window; set window as well"
            )
        return Causal()
    if window < 1:
        raise ValueError(f"window: must be at least 1 (the query's own token counts), got {window}")
    if n_sink < 0:
        raise ValueError(f"n_sink: must be at least 0, got {n_sink}")
    near = Window(window)
    return Causal() & (near | Sinks(n_sink) if n_sink else near)
