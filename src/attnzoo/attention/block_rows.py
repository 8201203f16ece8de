"""Summaries of blocks of tokens, counted inside the document: a row for each that is complete."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention.rows import Rows, pick
from attnzoo.attention.timeline import Axis


class BlockRows(Rows):
    """Cached blocks as one forward sees them."""

    def blocks(self, name: str, new: Tensor, per: int) -> Tensor:
        """Summaries of blocks of ``per`` tokens, counted inside the document.

        Args:
            new: ``(B, heads, T, d)``, at each token the summary of its block up to it. Where a block ends, it
                is kept.

        Returns:
            ``(B, heads, N + T, d)``: the cached blocks, then ``new``; aligned with `block_axis`.
        """
        if self.cache is None:
            return new
        line, (B, heads, T, d) = self.line, new.shape
        room = line.clock.room // per
        old = self.cache.slots[name][:, : heads * room * d].view(B, heads, room, d)
        if not line.clock.ragged:
            both = torch.cat([old[:, :, : line.past // per].to(new.dtype), new], dim=2)
            old[:, :, line.past // per : (line.past + T) // per] = new[:, :, per - 1 - line.past % per :: per]
            return both
        both = torch.cat([old.to(new.dtype), new], dim=2)
        ends = torch.arange(room, device=new.device)[None] * per + per - 1
        place, fresh = self.standing(ends)
        old.copy_(pick(fresh, place, new.to(old.dtype), old))
        return both

    def block_ends(self, per: int) -> tuple[Tensor, Tensor | None]:
        """Where blocks of ``per`` tokens end in this forward.

        Returns:
            ``(B or 1, M)`` places of their last tokens, and which of them there are (None = all).
        """
        line = self.line
        if line.doc is None:
            first = per - 1 - line.past % per
            return torch.arange(first, max(line.length, first), per, device=line.order.device)[None], None
        ends = (line.order + 1) % per == 0
        if line.valid is not None:
            ends = ends & line.valid
        step = torch.arange(line.length, device=ends.device)
        place = torch.where(ends, step, line.length).sort(dim=1).values[:, : -(-line.length // per)]
        return place.clamp(max=line.length - 1), place < line.length

    def ended(self, name: str, new: Tensor, per: int) -> Tensor:
        """As `blocks`, where summaries are made only of blocks that end.

        Args:
            new: ``(B, heads, M, d)``, at the places of `block_ends`.

        Returns:
            ``(B, heads, N + M, d)``: the cached blocks, then ``new``; aligned with `ended_axis`.
        """
        if self.cache is None:
            return new
        line, (B, heads, M, d) = self.line, new.shape
        room = line.clock.room // per
        old = self.cache.slots[name][:, : heads * room * d].view(B, heads, room, d)
        if not line.clock.ragged:
            had = line.past // per
            both = torch.cat([old[:, :, :had].to(new.dtype), new], dim=2)
            old[:, :, had : had + M] = new
            return both
        both = torch.cat([old.to(new.dtype), new], dim=2)
        last = torch.arange(room, device=new.device)[None] * per + per - 1
        place, fresh = self.standing(last)
        ends, _ = self.block_ends(per)
        index = (ends[:, None] < place[..., None]).sum(-1)
        old.copy_(pick(fresh, index, new.to(old.dtype), old))
        return both

    def ended_axis(self, per: int) -> Axis:
        """The key axis of `ended`: a block stands where its last token does."""
        line, (place, live) = self.line, self.block_ends(per)
        order = line.order.gather(1, place.expand(line.order.shape[0], -1))
        doc = None if line.doc is None else torch.where(live, line.doc.gather(1, place), -1)
        if self.cache is None:
            return Axis(order, doc, ("ended", per))
        whole = self.block_axis(per)
        had = whole.order.shape[1] - line.length
        doc = None if doc is None else torch.cat([whole.doc[:, :had], doc], dim=1)
        return Axis(torch.cat([whole.order[:, :had], order], dim=1), doc, ("ended", per))

    def block_axis(self, per: int) -> Axis:
        """The key axis of `blocks`: a block stands where its last token does."""
        line = self.line
        if self.cache is None:
            return Axis(line.order, line.doc, ("blocks", per))
        room = line.clock.room // per if line.clock.ragged else line.past // per
        ends = torch.arange(room, device=line.order.device)[None] * per + per - 1
        if not line.clock.ragged:
            return Axis(torch.cat([ends, line.order], dim=1), None, ("blocks", per))
        batch, seen = line.order.shape[0], (line.clock.used - line.clock.start)[:, None]
        doc = torch.where(ends < seen, 0, -1)
        order = torch.cat([ends.expand(batch, -1), line.order], dim=1)
        return Axis(order, torch.cat([doc, line.doc], dim=1), ("blocks", per))
