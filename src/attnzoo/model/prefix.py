"""Learned tokens before every document (meta tokens, arXiv 2411.13676; a learned sink is one of them).

They are inputs like any other to the mixers: they take places in the document, in caches and in scan states,
and what comes out at them is dropped. A document gets them once, where its first token arrives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.attention import timeline
from attnzoo.attention.site import INIT_STD, flag
from attnzoo.attention.timeline import Clock
from attnzoo.context import Context
from attnzoo.cost import Cost


class Placed(NamedTuple):
    """One forward's tokens among the learned ones.

    Args:
        ctx: documents and positions of the longer rows.
        source: ``(B, T')`` what stands there: t < T is the caller's token, T + m a learned one, -1 padding.
        slots: ``(B, T)`` where each of the caller's tokens went.
    """

    ctx: Context
    source: Tensor
    slots: Tensor


class Prefix(nn.Module):
    """M learned embeddings ``(M, D)``, which start as those of tokens do."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = flag(nn.Parameter(torch.randn(count, dim) * INIT_STD), decay=False)

    def forward(self, embedded: Tensor, source: Tensor) -> Tensor:
        """``(B, T, D)`` -> ``(B, T', D)``, placed as `Placed.source` says."""
        both = torch.cat([embedded, self.weight.to(embedded.dtype).expand(len(embedded), -1, -1)], dim=1)
        return both.gather(1, source.clamp(min=0)[..., None].expand(-1, -1, both.shape[2]))

    def place(
        self, ctx: Context, batch: int, length: int, device: torch.device, clock: Clock | None
    ) -> Placed | None:
        """Where they go in this forward; None = no document starts.

        Raises:
            ValueError: as `timeline.read`.
        """
        M = len(self.weight)
        begins = _begins(ctx, batch, length, device, clock)
        if begins is None or not bool(begins.any()):
            return None
        slots = torch.arange(length, device=device) + M * begins.cumsum(1)
        longer = length + M * int(begins.sum(1).max())
        source = torch.full((batch, longer), -1, device=device)
        source.scatter_(1, slots, torch.arange(length, device=device).expand(batch, -1))
        rows, cols = begins.nonzero(as_tuple=True)
        learned = torch.arange(M, device=device)
        source[rows[:, None], slots[rows, cols][:, None] - M + learned] = length + learned
        # a learned token is of the document, and counts on to the position, of the token it stands before
        owner = torch.full_like(source, -1).scatter_(1, slots, source.gather(1, slots))
        owner[rows[:, None], slots[rows, cols][:, None] - M + learned] = cols[:, None].expand(-1, M)
        ids = pos = None
        if ctx.segment_ids is not None or (clock is not None and clock.ragged):
            given = ctx.segment_ids
            if given is None:
                given = torch.where(clock.ident > 0, clock.ident, 1)[:, None].expand(-1, length)
            ids = given.to(device).gather(1, owner.clamp(min=0)).masked_fill(owner < 0, 0)
        if ctx.positions is not None:
            pos = ctx.positions.expand(batch, -1).gather(1, owner.clamp(min=0))
            pos = pos + torch.where(source < length, M, source - length)
        return Placed(replace(ctx, segment_ids=ids, positions=pos), source, slots)


def _begins(
    ctx: Context, batch: int, length: int, device: torch.device, clock: Clock | None
) -> Tensor | None:
    """``(B, T)`` whether a token is the first of its document, as the caller orders them."""
    if ctx.segment_ids is None and not (clock is not None and clock.ragged):
        if clock is not None and clock.length:
            return None
        timeline.read(ctx, batch, length, device)  # checks what was given
        return (torch.arange(length, device=device) == 0).expand(batch, -1)
    line = timeline.read(ctx, batch, length, device, clock)
    begins = (line.order == 0).long()
    return line.restore(begins) > 0


def per_token(cost: Cost, seq_len: int, count: int) -> Cost:
    """Costs of rows with ``count`` learned tokens, per token of the ``seq_len`` others."""
    more = (seq_len + count) / seq_len

    def grown(parts: dict[str, float]) -> dict[str, float]:
        return {name: value * more for name, value in parts.items()}

    return replace(
        cost,
        forward_flops=cost.forward_flops * more,
        executed_flops=cost.executed_flops * more,
        split=grown(cost.split),
        masked=grown(cost.masked),
        elementwise=grown(cost.elementwise),
        state_bytes=cost.state_bytes + round(count * cost.cache_bytes_per_token),
    )
