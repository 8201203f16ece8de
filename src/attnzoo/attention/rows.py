"""Rows of keys, one per token: all of them, or a ring of those that a mask can still need."""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo.attention.slots import Cache
from attnzoo.attention.timeline import Axis, Timeline


class Rows:
    """Cached rows as one forward sees them, aligned with `axis`."""

    def __init__(self, line: Timeline, cache: Cache | None) -> None:
        self.line, self.cache = line, cache
        self.ring = cache is not None and cache.retain is not None

    @property
    def aligned(self) -> bool:
        """Whether the last T keys are this forward's tokens in every row."""
        return self.cache is None or self._starts or not (self.ring or self.line.clock.ragged)

    @property
    def _starts(self) -> bool:
        """A first chunk in lockstep: the ring holds nothing yet, so the new rows are all there is."""
        return self.ring and not self.line.clock.ragged and self.line.past == 0

    def axis(self) -> Axis:
        """Order and document of the keys that `rows` returns."""
        if not self.ring:
            return self.line.axis()
        if self._starts:
            return Axis(self.line.order, None, "rows")
        if self.line.length == 1:
            return self.line.once(("ring", self.cache.retain), lambda: self._ring_axis(after=True))
        return self.line.once(("ring+", self.cache.retain), self._ring_and_new)

    def rows(self, name: str, new: Tensor) -> Tensor:
        """Appends ``new`` ``(B, heads, T, d)``; returns all keys so far ``(B, heads, S, d)``, aligned with
        `axis`.
        """
        return new if self.cache is None else self._append(self.cache.slots[name], new)

    def _append(self, old: Tensor, new: Tensor) -> Tensor:
        stored = new.to(old.dtype)
        if self.ring:
            return self._ring_rows(old, stored).to(new.dtype)
        if not self.line.clock.ragged:
            old[:, :, self.line.past : self.line.high] = stored
        elif self.line.length == 1:
            self._put_one(old, stored, self.line.base)
        else:
            self._put_run(old, stored)
        return old[:, :, : self.line.high].to(new.dtype)

    def places(self) -> Tensor:
        """``(B or 1, S)`` positions of the keys that `rows` returns, for what turns keys at read.

        They are kept beside the clock, once for all layers, and not counted as cache.
        """
        if self.cache is None:
            return self.line.pos
        return self.line.once(("places", self.cache.retain), self._places)

    def _places(self) -> Tensor:
        clock, retain, device = self.line.clock, self.cache.retain, self.line.pos.device
        room = retain.size if retain else clock.room
        if retain not in clock.places:
            clock.places[retain] = torch.zeros(
                self.cache.batch, 1, room, 1, dtype=torch.float64, device=device
            )
        new = self.line.pos.double().expand(self.cache.batch, -1)
        return self._append(clock.places[retain], new[:, None, :, None])[:, 0, :, 0]

    def _put_one(self, old: Tensor, new: Tensor, slot: Tensor) -> None:
        rows = torch.arange(old.shape[0], device=old.device)
        slot = slot.clamp(max=old.shape[2] - 1)
        fresh = new[:, :, 0]
        if self.line.valid is not None:
            fresh = torch.where(self.line.valid[:, 0, None, None], fresh, old[rows, :, slot])
        old[rows, :, slot] = fresh

    def _put_run(self, old: Tensor, new: Tensor) -> None:
        line, high = self.line, self.line.high
        place = torch.arange(high, device=old.device)[None] - line.base[:, None]
        fresh = (place >= 0) & (place < line.count()[:, None])
        old[:, :, :high] = pick(fresh, place, new, old[:, :, :high])

    def _seen(self) -> Tensor:
        """``(B or 1, 1)`` tokens of the current document before this forward."""
        clock = self.line.clock
        if clock.ragged:
            return (clock.used - clock.start)[:, None]
        return torch.full((1, 1), clock.length, device=self.line.order.device)

    def _ring_axis(self, after: bool) -> Axis:
        """Order of each ring slot before or after this forward; document -1 where a slot holds nothing."""
        line, (sinks, window) = self.line, self.cache.retain
        seen = self._seen()
        if after:
            seen, n = line.order[:, -1:] + 1, line.length
            if line.valid is not None:
                n = line.count()[:, None]
                seen = torch.where(n > 0, line.order.gather(1, (n - 1).clamp(min=0)) + 1, self._seen())
        slot = torch.arange(sinks + window, device=seen.device)[None]
        lap = torch.div(seen - 1 - slot, window, rounding_mode="floor")
        order = torch.where(slot < sinks, slot, slot + lap * window)
        live = (order < seen) & (order >= torch.where(slot < sinks, 0, sinks))
        run = 0
        if after and line.doc is not None:
            run = line.doc[:, -1:]
        return Axis(order, torch.where(live, run, -1), ("ring", self.cache.retain))

    def _ring_and_new(self) -> Axis:
        line, ring = self.line, self._ring_axis(after=False)
        batch = max(line.order.shape[0], ring.order.shape[0])
        doc = line.doc if line.doc is not None else torch.zeros_like(line.order)
        wide = [z.expand(batch, -1) for z in (ring.order, line.order, ring.doc, doc)]
        return Axis(torch.cat(wide[:2], dim=1), torch.cat(wide[2:], dim=1), ("ring+", self.cache.retain))

    def _ring_rows(self, old: Tensor, new: Tensor) -> Tensor:
        line, (sinks, window) = self.line, self.cache.retain
        if line.length == 1 and not self._starts:
            order = line.order[:, 0].expand(old.shape[0])
            self._put_one(old, new, torch.where(order < sinks, order, sinks + (order - sinks) % window))
            return old
        keys = new if self._starts else torch.cat([old, new], dim=2)
        target = self._ring_axis(after=True)
        place, fresh = self.standing(target.order)
        fresh = fresh & (target.doc >= 0)
        old.copy_(pick(fresh.expand(old.shape[0], -1), place.expand(old.shape[0], -1), new, old))
        return keys

    def standing(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """Which of this forward's tokens stand at ``order`` in the row's last document, if any do."""
        line = self.line
        last = line.count()[:, None] - 1 if line.valid is not None else line.length - 1
        if line.doc is None:
            newest = line.order[:, -1:]
        else:
            newest = line.order.gather(
                1, (last if isinstance(last, Tensor) else line.doc * 0 + last)[:, :1].clamp(min=0)
            )
        place = order - newest + last
        run_start = 0 if line.doc is None else (last - newest).clamp(min=0)
        return place, (place >= run_start) & (place <= last)


def pick(fresh: Tensor, place: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` at ``place`` along the token axis where ``fresh``, else ``old``."""
    index = place.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(fresh[:, None, :, None], new.gather(2, index), old)
