"""What a mixer keeps between calls: cached rows, tails of convolutions, scan states.

Stages declare their slots (`Stage.memory`), so that `new_cache`, `cost()` and the forward read one table, and
use three calls that mean the same in training, prefill and decode: `rows`, `tail`, `state`/`put`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.timeline import Axis, Clock, Timeline


class Slot(NamedTuple):
    """One declared piece of memory, per batch row.

    Args:
        kind: "rows" (one per token, or a ring of them), "blocks" (one per ``per`` tokens of a document, once
            they are complete), "tail" (the last tokens' values) or "state".
        shape: rows and blocks ``(heads, width)``; tail ``(tokens, channels)``; state any.
        per: tokens per block.
        wide: blocks that are states: kept, as states are, in fp32 or fp64.
    """

    kind: str
    shape: tuple[int, ...]
    per: int = 1
    wide: bool = False

    @property
    def size(self) -> int:
        return int(torch.Size(self.shape).numel())

    def item(self, dtype: torch.dtype, state_size: int) -> int:
        """Bytes of one number, of a cache of ``dtype`` whose states take ``state_size``."""
        return state_size if self.kind == "state" or self.wide else dtype.itemsize


class Retain(NamedTuple):
    """How many rows a mask can still need: the first ``sinks`` and the last ``window`` of a document."""

    sinks: int
    window: int

    @property
    def size(self) -> int:
        return self.sinks + self.window


@dataclass
class Cache:
    """The memory of one mixer, or of one layer of a model.

    Args:
        slots: tensors by slot name, batch first.
        clock: how far its rows have come.
        retain: set where rows are rings.
        batch: rows of the batch.
    """

    slots: dict[str, Tensor]
    clock: Clock
    retain: Retain | None = None
    batch: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of what the method stores; the clock (a few integers per row) is not counted."""
        return sum(t.numel() * t.element_size() for t in self.slots.values())

    @property
    def length(self) -> int:
        """Tokens seen; in rows of unequal length an upper bound."""
        return self.clock.length


def build_cache(
    slots: dict[str, Slot],
    retain: Retain | None,
    batch: int,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device | str,
    double: bool,
    clock: Clock | None = None,
) -> Cache:
    """Zeroed memory for ``batch`` rows; ``double`` keeps states in fp64."""
    for field, value in (("batch_size", batch), ("max_len", max_len)):
        if value < 1:
            raise ValueError(f"{field}: must be at least 1, got {value}")
    state_dtype = torch.float64 if double else torch.float32
    room = retain.size if retain else max_len
    tensors = {}
    for name, slot in slots.items():
        shape = (slot.shape[0], room, slot.shape[1]) if slot.kind == "rows" else slot.shape
        if slot.kind == "blocks":
            shape = (-(-max_len * slot.size // slot.per),)  # the last block may not get complete
        kind_dtype = state_dtype if slot.kind == "state" or slot.wide else dtype
        tensors[name] = torch.zeros(batch, *shape, dtype=kind_dtype, device=device)
    clock = clock or Clock()
    grow = {"blocks"} if retain else {"rows", "blocks"}
    if any(slot.kind in grow for slot in slots.values()):
        clock.room = max_len
    return Cache(tensors, clock, retain, batch)


class Memory:
    """The slots as one forward sees them; without a cache everything passes through."""

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
        place, fresh = self._places_of(ends)
        old.copy_(_pick(fresh, place, new.to(old.dtype), old))
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
        place, fresh = self._places_of(last)
        ends, _ = self.block_ends(per)
        index = (ends[:, None] < place[..., None]).sum(-1)
        old.copy_(_pick(fresh, index, new.to(old.dtype), old))
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

    def tail(self, name: str, z: Tensor, n: int) -> Tensor:
        """``z`` ``(B, T, C)`` preceded by the ``n`` tokens before it (zeros without a cache): ``(B, n + T,
        C)``.

        Document cuts are the stage's: the predecessor ``m`` steps back counts where ``order >= m``.
        """
        if self.cache is None:
            return torch.nn.functional.pad(z, (0, 0, n, 0))
        old = self.cache.slots[name]
        both = torch.cat([old.to(z.dtype), z], dim=1)
        if not self.line.clock.ragged or n == 0:
            old.copy_(both[:, both.shape[1] - n :])
        else:
            last = self.line.count()[:, None] + torch.arange(n, device=z.device)
            old.copy_(both.gather(1, last[..., None].expand(-1, -1, z.shape[2])))
        return both

    def state(self, name: str) -> Tensor | None:
        """The state that the cached document has reached; None without a cache."""
        return None if self.cache is None else self.cache.slots[name]

    def put(self, name: str, value: Tensor) -> None:
        if self.cache is not None:
            self.cache.slots[name].copy_(value)

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
        old[:, :, :high] = _pick(fresh, place, new, old[:, :, :high])

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
        place, fresh = self._places_of(target.order)
        fresh = fresh & (target.doc >= 0)
        old.copy_(_pick(fresh.expand(old.shape[0], -1), place.expand(old.shape[0], -1), new, old))
        return keys

    def _places_of(self, order: Tensor) -> tuple[Tensor, Tensor]:
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


def _pick(fresh: Tensor, place: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``new`` at ``place`` along the token axis where ``fresh``, else ``old``."""
    index = place.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.where(fresh[:, None, :, None], new.gather(2, index), old)
