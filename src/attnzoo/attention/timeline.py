"""Where the tokens of one forward stand: their document, their place in it, their slot in the cache.

A forward is read once, here; masks, rotations, convolutions, scans and caches only compare the numbers below,
so that packed documents, padding, chunked prefill and ragged decoding are one case. Padding is moved to the
right end of each row first ("compacted"): a causal mixer then cannot see it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.context import Context

EVERY = -2  # the document of a key that all documents have


class Axis(NamedTuple):
    """The key axis: for each key its place in its document, its document, and whether all rows agree.

    Args:
        order: ``(B or 1, S)`` index of the key within its document.
        doc: ``(B or 1, S)`` document run, -1 for a slot that holds nothing, `EVERY`; None when all keys are
            of one document.
        tag: names the axis within one forward, so that tables made from it are shared by the layers.
    """

    order: Tensor
    doc: Tensor | None
    tag: Hashable = None


@dataclass
class Clock:
    """How far the rows of a cache have come; shared by the layers of a model.

    ``length`` counts the tokens while all rows go in lockstep, and bounds them afterwards; ``room`` is what
    full rows hold (None: nothing grows). The tensors exist once segment ids were seen.
    ``used``: slots filled, ``start``: slot where the current document begins, ``ident``: its id,
        ``position``: the
    position that the next token gets by default; all ``(B,)``. ``places``: positions of cached keys, where a
    layer turns keys at read; by what its rows retain.
    """

    length: int = 0
    room: int | None = None
    position: Tensor | int = 0
    used: Tensor | None = None
    start: Tensor | None = None
    ident: Tensor | None = None
    places: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def ragged(self) -> bool:
        return self.used is not None

    def split_rows(self, batch: int, device: torch.device) -> None:
        """From lockstep to one counter per row; what was cached without ids is document 1."""
        if self.ragged:
            return
        self.used = torch.full((batch,), self.length, device=device)
        self.start = torch.zeros_like(self.used)
        self.ident = torch.full_like(self.used, 1 if self.length else 0)
        self.position = torch.zeros_like(self.used) + self.position


class Whole(NamedTuple):
    """The tokens up to a part's end: order, document run (-1 = one that has ended) and position."""

    order: Tensor
    doc: Tensor | None
    pos: Tensor


@dataclass
class Timeline:
    """One forward's reading of its documents; see the module.

    Args:
        order: ``(B or 1, T)`` index of each token within its document, on from the cache.
        pos: ``(B or 1, T)`` what position stages rotate by.
        doc: ``(B, T)`` document run, 0 = the document that the cache holds; None = all one document.
        valid: ``(B, T)`` False at padding; None = no padding.
        perm: ``(B, T)`` gather index that moved padding to the right; None = nothing moved.
        clock: the cache's clock before this forward; None without a cache.
        base: ``(B,)`` cache slot of the row's first token, in ragged rows.
        ident: ``(B, T)`` the caller's document ids, compacted.
        whole: where the tokens are a part of their sequences: all tokens up to the part's end. The clock then
            stands at the part's beginning, and run 0 is the document that goes on into the part.
    """

    length: int
    order: Tensor
    pos: Tensor
    doc: Tensor | None = None
    valid: Tensor | None = None
    perm: Tensor | None = None
    clock: Clock | None = None
    base: Tensor | None = None
    ident: Tensor | None = None
    whole: Whole | None = None
    memo: dict[Hashable, object] = field(default_factory=dict)

    @property
    def past(self) -> int:
        """Tokens cached before this forward: exact in lockstep, an upper bound in ragged rows."""
        return self.clock.length if self.clock else 0

    @property
    def high(self) -> int:
        """Slots of full rows that this forward may touch."""
        room = self.clock.room if self.clock else None
        return self.past + self.length if room is None else min(self.past + self.length, room)

    def check_room(self) -> None:
        """Raises ValueError where full rows cannot take this forward's tokens."""
        clock = self.clock
        if clock is None or clock.room is None or self.past + self.length <= clock.room:
            return
        need = int((self.base + self.count()).max()) if clock.ragged else self.past + self.length
        if need > clock.room:
            raise ValueError(
                f"cache: {need} tokens do not fit max_len={clock.room}; "
                f"make it with new_cache(batch_size, {need})"
            )

    def place(self, room: int, field: str) -> Tensor:
        """``(B or 1, T)`` index of each token in its document, for what has ``room`` entries; 0 at padding.

        Raises:
            ValueError: a document is longer; ``field`` is the option that sets the room.
        """
        order = self.order if self.valid is None else torch.where(self.valid, self.order, 0)
        if self.past + self.length > room and (longest := int(order.max()) + 1) > room:
            raise ValueError(f"{field}: a document has {longest} tokens, there is room for {room}; raise it")
        return order

    def once(self, key: Hashable, make: Callable[[], object]) -> object:
        """A value that all layers of this forward share."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def compact(self, z: Tensor, fill: float = 0.0) -> Tensor:
        """``(B, T, ...)`` with padding at the right and blanked, whatever it held."""
        if self.valid is None:
            return z
        if self.perm is not None:
            z = z.gather(1, _widen(self.perm, z).expand_as(z))
        return self.blank(z, fill)

    def blank(self, z: Tensor, fill: float = 0.0) -> Tensor:
        """Compacted ``(B, T, ...)`` with ``fill`` at padding."""
        if self.valid is None:
            return z
        return torch.where(_widen(self.valid, z), z, torch.full((), fill, dtype=z.dtype, device=z.device))

    def restore(self, z: Tensor) -> Tensor:
        """The inverse: ``(B, T, ...)`` back in the caller's slots, zero at padding."""
        if self.valid is None:
            return z
        z = self.blank(z)
        if self.perm is None:
            return z
        inverse = self.perm.argsort(dim=1)
        return z.gather(1, _widen(inverse, z).expand_as(z))

    def axis(self) -> Axis:
        """The key axis of rows kept in full: cached tokens, then this forward's."""
        if self.clock is None:
            return Axis(self.order, self.doc, "rows")
        return self.once("axis", self._cached_axis)

    def _cached_axis(self) -> Axis:
        slots = torch.arange(self.high, device=self.order.device)[None]
        if not self.clock.ragged:
            return Axis(slots, None, "rows")
        used, start, base = (z[:, None] for z in (self.clock.used, self.clock.start, self.base))
        place = slots - base
        fresh = (place >= 0) & (place < self.count()[:, None])
        source = place.clamp(0, self.length - 1)
        cached = (slots >= start) & (slots < used) & (base == used)
        doc = torch.where(fresh, self.doc.gather(1, source), torch.where(cached, 0, -1))
        return Axis(torch.where(fresh, self.order.gather(1, source), slots - start), doc, "rows")

    def count(self) -> Tensor:
        """``(B,)`` tokens of this forward that are not padding."""
        return self.valid.sum(1) if self.valid is not None else torch.full_like(self.base, self.length)

    def advance(self) -> None:
        """Moves the cache's clock past this forward."""
        clock = self.clock
        if clock is None or self.whole is not None:
            return
        if not clock.ragged:
            clock.position = self.pos[:, -1] + 1
            clock.length += self.length
            return
        n = self.count()
        last = (n - 1).clamp(min=0)[:, None]
        some = n > 0
        order, pos = self.order.gather(1, last)[:, 0], self.pos.expand_as(self.order).gather(1, last)[:, 0]
        clock.ident = torch.where(some, self.ident.gather(1, last)[:, 0], clock.ident)
        clock.start = torch.where(some, self.base + n - order - 1, clock.start)
        clock.used = torch.where(some, self.base + n, clock.used)
        clock.position = torch.where(some, pos + 1, clock.position)
        clock.length = self.high


def read(ctx: Context, batch: int, length: int, device: torch.device, clock: Clock | None = None) -> Timeline:
    """Reads documents and positions of one forward.

    Raises:
        ValueError: ``positions`` or ``segment_ids`` are not ``(B, T)``, or ids are negative or not integers.
    """
    _check(ctx, batch, length)
    if ctx.segment_ids is None and not (clock and clock.ragged):
        line = _lockstep(ctx, length, device, clock)
        line.check_room()
        return line
    if clock is not None:
        clock.split_rows(batch, device)
    ids, valid, perm = _ids(ctx, batch, length, device, clock)
    before = clock.ident if clock else torch.zeros(batch, dtype=torch.long, device=device)
    previous = torch.cat([before[:, None], ids[:, :-1]], dim=1)
    begins = ids != previous if valid is None else (ids != previous) & valid
    step = torch.arange(length, device=device).expand(batch, length)
    first = torch.where(begins, step, -1).cummax(dim=1).values
    goes_on = first < 0
    seen = (clock.used - clock.start)[:, None] if clock else 0
    order = torch.where(goes_on, step + seen, step - first)
    line = Timeline(length, order, order, begins.cumsum(1), valid, perm, clock, ident=ids)
    if clock is not None:
        line.base = torch.where(begins[:, 0], torch.zeros_like(clock.used), clock.used)
        line.pos = torch.where(goes_on, step + clock.position[:, None], step - first)
    if ctx.positions is not None:
        line.pos = line.compact(ctx.positions.expand(batch, -1))
    line.check_room()
    return line


def _lockstep(ctx: Context, length: int, device: torch.device, clock: Clock | None) -> Timeline:
    step = torch.arange(length, device=device)[None]
    order = step + (clock.length if clock else 0)
    pos = ctx.positions
    if pos is None:
        position = clock.position if clock else 0
        pos = step + (position[:, None] if isinstance(position, Tensor) else position)
    return Timeline(length, order, pos, clock=clock)


def _ids(
    ctx: Context, batch: int, length: int, device: torch.device, clock: Clock | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Document ids with padding at the right, the validity mask, and the permutation that did it."""
    if ctx.segment_ids is None:
        ids = torch.where(clock.ident > 0, clock.ident, 1)[:, None].expand(batch, length)
        return ids, None, None
    ids = ctx.segment_ids.to(device=device, dtype=torch.long)
    valid = ids > 0
    if bool(valid.all()):
        return ids, None, None
    if bool((valid[:, 1:] <= valid[:, :-1]).all()):
        return ids, valid, None
    perm = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, perm), valid.gather(1, perm), perm


def _check(ctx: Context, batch: int, length: int) -> None:
    for name, value in (("positions", ctx.positions), ("segment_ids", ctx.segment_ids)):
        if value is not None and tuple(value.shape) not in {(batch, length)} | (
            {(1, length)} if name == "positions" else set()
        ):
            raise ValueError(f"{name}: must be (B, T) = {(batch, length)}, got {tuple(value.shape)}")
    ids = ctx.segment_ids
    if ids is not None and (ids.is_floating_point() or bool((ids < 0).any())):
        raise ValueError("segment_ids: must be integers >= 0 (0 = padding, n > 0 = document n)")


def _widen(index: Tensor, like: Tensor) -> Tensor:
    return index.reshape(*index.shape, *(1,) * (like.dim() - 2))
