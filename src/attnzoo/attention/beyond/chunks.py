"""Chunks of a document: which end in a forward, the means of their tokens, and the masks that read them.

The means of chunks that began in an earlier forward need the state "unfinished" ``(D,)``, the sum of x over
the chunk that the cached document is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.stages.mask import Mask
from attnzoo.attention.timeline import Axis


@dataclass(frozen=True)
class OwnChunk(Mask):
    """Keys at or before the query in its chunk of ``size`` tokens."""

    size: int
    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k // self.size == q // self.size)

    def reach(self) -> int:
        return self.size - 1


@dataclass(frozen=True)
class Summaries(Mask):
    """Keys that stand for chunks, by number: the last ``slots`` before the query's chunk.

    The first key, of number -1 and no document, is seen where there is none before.
    """

    size: int
    slots: int

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        own = q // self.size
        return (k < own) & (k >= own - self.slots) & (k >= 0)

    def visible(self, query: Axis, key: Axis) -> Tensor:
        nothing = torch.arange(key.order.shape[1], device=key.order.device) == 0
        return super().visible(query, key) | nothing & (query.order[:, :, None] < self.size)


class Chunks(NamedTuple):
    """Where this forward's tokens stand among chunks, for N chunks that could end in a row.

    Args:
        number, doc, ends: ``(B, N)`` the chunk's number in its document, its document, whether it exists.
        slot: ``(B, T)`` which of the N a token belongs to, N for none.
    """

    number: Tensor
    doc: Tensor
    ends: Tensor
    slot: Tensor


def find_chunks(size: int, call: Call) -> Chunks:
    """The chunks of ``size`` tokens that end in this forward."""
    line, c, (B, T, _) = call.line, size, call.x.shape
    order = line.order.expand(B, -1)
    doc = torch.zeros_like(order) if line.doc is None else line.doc
    ends = (order + 1) % c == 0
    if line.valid is not None:
        ends = ends & line.valid
    N = T // c if line.clock is None else min(T, (T + c - 1) // c)
    place = (~ends).to(torch.uint8).argsort(dim=1, stable=True)[:, :N]
    exists = ends.gather(1, place)
    slot = ends.long().cumsum(1) - ends.long()  # chunks that end before the token
    inside = slot < N
    slot = slot.clamp(max=max(N - 1, 0))
    step = torch.arange(T, device=order.device)
    if N:
        left = c - 1 - order % c
        inside = inside & exists.gather(1, slot) & (place.gather(1, slot) - step == left)
    number = torch.where(exists, order.gather(1, place) // c, -1)
    return Chunks(number, doc.gather(1, place), exists, torch.where(inside, slot, N))


def goes_on(call: Call) -> Tensor:
    """``(B, 1)`` tokens of the cached document before this forward; 0 where it does not go on."""
    first = call.line.order[:, :1].expand(len(call.x), -1)
    return first if call.line.doc is None else first * (call.line.doc[:, :1] == 0)


def chunk_means(chunks: Chunks, size: int, call: Call) -> Tensor:
    """``(B, N, D)`` means of x over the chunks that end in this forward, with their cached beginnings."""
    N, started = chunks.number.shape[1], call.mem.state("unfinished")
    x = call.x.to(torch.float64 if call.x.dtype == torch.float64 else torch.float32)
    slot = chunks.slot[..., None].expand_as(x)
    sums = x.new_zeros(len(x), N + 1, x.shape[2]).scatter_add(1, slot, x)[:, :N]
    if started is not None:
        if N:
            begun = (goes_on(call) % size > 0) & (chunks.slot[:, :1] == 0)
            first = sums[:, :1] + torch.where(begun[..., None], started[:, None], 0)
            sums = torch.cat([first, sums[:, 1:]], dim=1)
        _carry(x, started, size, call)
    return (sums / size).to(call.x.dtype)


def _carry(x: Tensor, started: Tensor, size: int, call: Call) -> None:
    """The sum of x over the unfinished chunk of each row's last document."""
    line, B = call.line, len(x)
    order = line.order.expand(B, -1)
    doc = torch.zeros_like(order) if line.doc is None else line.doc
    valid = torch.ones_like(order, dtype=torch.bool) if line.valid is None else line.valid
    last = (valid.sum(1, keepdim=True) - 1).clamp(min=0)
    next_chunk = (order.gather(1, last) + 1) // size
    newest = doc.gather(1, last)
    mine = (doc == newest) & (order // size == next_chunk) & valid
    rest = (x * mine[..., None]).sum(1)
    same = (newest == 0) & (goes_on(call) // size == next_chunk)
    rest = rest + torch.where(same, started, 0)
    call.mem.put("unfinished", torch.where(valid[:, :1], rest, started))
