"""One level of a pooling pyramid: which of its tokens a forward completes, in which documents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """The tokens of one level that this forward completes, the rest of the axis at the right being empty.

    Args:
        x: ``(B, n, D)``. order: ``(B or 1, n)`` index inside the document, in tokens of the level.
        doc: ``(B, n)`` document, -1 where empty; None = all one. live: ``(B or 1, n)`` not empty.
        reads: ``(B or 1, n')`` at the finer level: how many of these tokens are complete at each of its own.
        seen: ``(B or 1, 1)`` tokens of the level in the cached document before.
    """

    x: Tensor
    order: Tensor
    doc: Tensor | None
    live: Tensor
    reads: Tensor | None
    seen: Tensor


def completed(fine: Level, ends: Tensor, reads: Tensor, room: int, rate: int) -> tuple[Tensor, Level]:
    """The next coarser level, still without its values.

    Args:
        ends: ``(B or 1, n)`` tokens of the finer level that complete one of this. reads: their running count.
        room: places for those. rate: tokens of the finer level per token.

    Returns:
        ``(B or 1, room)`` where in the finer level each ends, and the level; its ``x`` is the finer level's.
    """
    n, device = ends.shape[1], ends.device
    step = torch.arange(n, device=device).expand_as(reads)
    slot = torch.where(ends, reads - 1, room)  # the last place takes what ends no block
    at = torch.zeros(len(reads), room + 1, dtype=torch.long, device=device).scatter(1, slot, step)[:, :room]
    live = torch.arange(room, device=device)[None] < reads[:, -1:]
    order = ((fine.order.gather(1, at) + 1) // rate - 1).masked_fill(~live, 0)
    doc = None if fine.doc is None else fine.doc.gather(1, at).masked_fill(~live, -1)
    return at, Level(fine.x, order, doc, live, reads, fine.seen // rate)
